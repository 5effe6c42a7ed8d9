"""No defense: the attacked model as it is, the row that every defense is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from defenses.base import Edit, Models, OutputForm
from defenses.projection_edits import DataFreeDefense
from modeling.checkpoint import Checkpoint


class NoDefense(DataFreeDefense):
    """Leaves the attacked model alone; nothing is written."""

    output_form: ClassVar[OutputForm] = "same"
    is_identity: ClassVar[bool] = True

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Returns the attacked checkpoint itself."""
        from modeling.checkpoint import count_parameters

        return Edit(attacked, parameters_edited=0, parameters_total=count_parameters(attacked))
