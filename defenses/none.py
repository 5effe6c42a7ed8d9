"""No defense: the attacked model as it is, the row that every repair is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from defenses.base import Calibration, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint


class NoDefense(Defense):
    """OutputForm the attacked model alone; nothing is written."""

    needs: ClassVar[frozenset[str]] = frozenset()
    output_form: ClassVar[OutputForm] = "same"
    is_identity: ClassVar[bool] = True

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Prepares nothing."""
        return {}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Returns the attacked checkpoint itself."""
        from modeling.headers import count_parameters

        return Edit(attacked, parameters_edited=0, parameters_total=count_parameters(attacked))
