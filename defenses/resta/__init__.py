"""RESTA: add the safety vector to a fine-tuned model (Bhardwaj et al., ACL 2024).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from defenses.base import Edit, Models, OutputForm
from defenses.projection_edits import (
    DataFreeDefense,
    ProjectionDefense,
    describe_edit,
    require_unaligned_base,
)
from modeling.checkpoint import Checkpoint
from settings import Seed


class Resta(DataFreeDefense, ProjectionDefense):
    """Adds what alignment added once more, gamma times; optionally thins the fine-tuning first.

    Attributes:
        gamma: What the safety vector is multiplied by.
        dare_rate: DARE's drop rate p: each entry of the fine-tuning is dropped with this
            probability, the others divided by 1 - p; 0 leaves it whole.
        seed: Of what is dropped.
    """

    gamma: float = Field(0.5, ge=0)
    dare_rate: float = Field(0.0, ge=0, lt=1)
    seed: Seed = 42

    @property
    def output_form(self) -> OutputForm:
        """A longer adapter; full weights where the fine-tuning is thinned."""
        return "weights" if self.dare_rate > 0 else "adapter"

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model that is the base, or whose projections can't be read."""
        require_unaligned_base(models, "defense=resta adds what alignment added")
        super().check(models, attacked)

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model with the safety vector added.

        An adapter stays one where the alignment is an adapter too and nothing is dropped.

        Raises:
            ModelError: The models don't fit each other.
        """
        from defenses.resta.arithmetic import add_to_adapter, add_to_weights

        on_base = models.aligned.adapter is not None and models.aligned.base == models.base.base
        if on_base and attacked.adapter is not None and self.dare_rate == 0:
            count = add_to_adapter(models, attacked, out, self.gamma)
        else:
            count = add_to_weights(models, attacked, out, self.gamma, self.dare_rate, self.seed)
        return describe_edit(count, attacked)
