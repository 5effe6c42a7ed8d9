"""Safe LoRA: project a fine-tuning onto the alignment (Hsu et al., NeurIPS 2024).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from defenses.base import Calibration, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint, device_name
from settings import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.deltas import Factored


class SafeLoRA(Defense):
    """Projects the fine-tuning of the modules that it turned away from the alignment.

    Attributes:
        mode: "threshold" projects where the cosine is at most `tau`, "number" the `number`
            modules of the lowest cosine.
        tau: Of "threshold".
        number: Of "number".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    output_form: ClassVar[OutputForm] = "adapter"

    mode: Literal["threshold", "number"] = "threshold"
    tau: float = Field(0.5, ge=-1, le=1)
    number: int = Field(10, ge=0)

    def prepare_settings(self) -> dict[str, Any]:
        """Nothing is prepared."""
        return {}

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model that is the base, and more modules than there are.

        Raises:
            SettingError: What to set instead.
        """
        from modeling.deltas import projections

        if models.aligned.adapter is None and models.aligned.base == models.base.base:
            raise SettingError(
                "defense=safelora projects onto what alignment changed, but model.aligned is "
                "model.base itself; set model.base to the model before its alignment"
            )
        modules = len(projections(models.aligned))
        if self.mode == "number" and self.number > modules:
            raise SettingError(
                f"defense.number={self.number} is more than the model's {modules} projections; "
                "lower it, or set defense.mode=threshold"
            )

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Prepares nothing: the projection needs no data."""
        return {}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model with C Delta in place of Delta in the chosen modules.

        Raises:
            ModelError: The models don't fit each other.
            SettingError: Alignment changed none of the fine-tuned modules.
        """
        from defenses.safelora.project import choose, measure, project
        from modeling.deltas import alignment, write_edited
        from modeling.headers import count_parameters

        device = device_name()
        measured = measure(models, attacked, device)
        chosen = choose(
            {name: at.cosine for name, at in measured.items()}, self.mode, self.tau, self.number
        )

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor | None:
            if name not in chosen:
                return None
            return project(alignment(models, name, device), delta)

        count = write_edited(models.aligned, attacked, out, edit)
        return Edit(
            defended=count.defended,
            parameters_edited=count.changed,
            parameters_total=count_parameters(replace(attacked, adapter=None)),
            modules=tuple(name for name in measured if name in chosen),
            diagnostics={
                "cosine": {name: at.cosine for name, at in measured.items()},
                "norm_ratio": {name: at.norm_ratio for name, at in measured.items()},
                "projected": {name: name in chosen for name in measured},
            },
        )
