"""Reset: the aligned model again, the upper bound on safety and the lower bound on task gain.

What is written where: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from defenses.base import Edit, Models, OutputForm
from defenses.projection_edits import DataFreeDefense, ProjectionDefense, describe_edit
from modeling.checkpoint import Checkpoint


class Reset(DataFreeDefense, ProjectionDefense):
    """Undoes the fine-tuning: no defense can be safer, none can gain less on the task."""

    output_form: ClassVar[OutputForm] = "same"

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the aligned model in the attacked one's form (README, "What is written").

        Raises:
            ModelError: An adapter is more than LoRA on linear projections and would leave
                something behind, or the attacked model didn't come from the aligned one.
        """
        from defenses.reset.restore import copy_adapter, empty_adapter, write_aligned
        from modeling.projections import check_pairing, open_pairing

        pairing = open_pairing(models.aligned, attacked)
        check_pairing(pairing)
        if pairing.kind == "full":
            count = write_aligned(models.aligned, attacked, out)
        elif pairing.kind == "resumed":
            count = copy_adapter(pairing, out)
        else:
            count = empty_adapter(pairing, out)
        return describe_edit(count, attacked)
