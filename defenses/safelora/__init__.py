"""Safe LoRA: project a fine-tuning onto the alignment (Hsu et al., NeurIPS 2024).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_serializer

from defenses.base import Edit, Models, OutputForm
from defenses.projection_edits import DataFreeDefense, describe_edit, require_unaligned_base
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name
from settings import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from defenses.safelora.project import ProjectionFit
    from modeling.projections import Factored


# The official code projects 10 of Llama-2-7B's 64 query and value projections.
_OFFICIAL = (10, 64)


class SafeLoRA(DataFreeDefense):
    """Projects the fine-tuning of the modules that it turned away from the alignment.

    Attributes:
        mode: "threshold" projects where the cosine is at most `tau`, "number" the `number`
            modules of the lowest cosine.
        tau: Of "threshold".
        number: Of "number"; None: the official code's share of the modules.
    """

    output_form: ClassVar[OutputForm] = "adapter"

    mode: Literal["threshold", "number"] = "threshold"
    tau: float = Field(0.5, ge=-1, le=1)
    number: int | None = Field(None, ge=0)

    @field_serializer("number")
    def _unread(self, number: int | None) -> int | None:
        """Keeps the keys of when 10 was the default, where no number is read."""
        return _OFFICIAL[0] if self.mode == "threshold" and number is None else number

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model that is the base, and more modules than there are."""
        from modeling.projections import projections

        require_unaligned_base(models, "defense=safelora projects onto what alignment changed")
        modules = len(projections(models.aligned))
        if self.mode == "number" and (self.number or 0) > modules:
            raise SettingError(
                f"defense.number={self.number} is more than the model's {modules} projections; "
                "lower it, or set defense.mode=threshold"
            )

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model with C Delta in place of Delta in the chosen modules.

        Raises:
            SettingError: Alignment changed none of the fine-tuned modules.
        """
        from defenses.safelora.project import choose, fit_projection, measure, require_alignment
        from modeling.deltas import write_edited
        from modeling.projections import open_pairing

        device, pairing = device_name(), open_pairing(models.aligned, attacked)
        require_alignment(models, pairing, device)
        fits: dict[str, ProjectionFit] = {}
        modules: set[str] = set()
        if self.mode == "number":  # It takes all cosines to know the lowest.
            fits |= measure(models, pairing, device)
            number, of = _OFFICIAL
            count = max(1, round(len(fits) * number / of)) if self.number is None else self.number
            modules |= choose({name: fit.cosine for name, fit in fits.items()}, "number", 0, count)

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor | None:
            fit, projected = fit_projection(models, name, delta, device)
            if fit is None:
                return None
            fits[name] = fit
            if self.mode == "threshold":
                modules.update(choose({name: fit.cosine}, "threshold", self.tau, 0))
            return projected if name in modules else None

        asked = modules if self.mode == "number" else None
        edited = write_edited(models.aligned, attacked, out, edit, names=asked)
        names = [name for name in pairing.touched if name in fits]
        diagnostics = {
            "cosine": {name: fits[name].cosine for name in names},
            "norm_ratio": {name: fits[name].norm_ratio for name in names},
            "projected": {name: name in modules for name in names},
        }
        projected = tuple(name for name in names if name in modules)
        return describe_edit(edited, attacked, diagnostics, projected)
