"""Reset: the aligned model again, the upper bound on safety and the lower bound on task gain.

What is written where: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from defenses.base import Calibration, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint


class Reset(Defense):
    """Undoes the fine-tuning: no repair can be safer, none can gain less on the task."""

    needs: ClassVar[frozenset[str]] = frozenset()
    output_form: ClassVar[OutputForm] = "same"

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model whose projections can't be read.

        Raises:
            ModelError: It isn't a decoder of plain weights, or its adapter more than LoRA.
        """
        from modeling.deltas import projections

        projections(models.aligned)

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Prepares nothing."""
        return {}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the aligned model in the attacked one's form (README, "What is written").

        Raises:
            ModelError: An adapter is more than LoRA on linear projections and would leave
                something behind, or the attacked model didn't come from the aligned one.
        """
        from defenses.reset.restore import copy_adapter, empty_adapter, write_aligned
        from modeling.headers import count_parameters
        from modeling.pairing import check_pairing, open_pairing

        pairing = open_pairing(models.aligned, attacked)
        check_pairing(pairing)
        if pairing.kind == "full":
            count = write_aligned(models.aligned, attacked, out)
        elif pairing.kind == "resumed":
            count = copy_adapter(models.aligned, attacked, out)
        else:
            count = empty_adapter(attacked, out)
        return Edit(
            defended=count.defended,
            parameters_edited=count.changed,
            parameters_total=count_parameters(replace(attacked, adapter=None)),
            modules=count.modules,
        )
