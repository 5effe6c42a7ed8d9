"""Risk level 1, explicit harm: a few harmful rows and nothing else (Qi et al. 2023)."""

from __future__ import annotations

from pydantic import Field

from attacks.base import AttackData
from attacks.fine_tuning import Adapter, FineTuning, check_size
from data.mixture import mix
from data.rows import Example
from modeling.checkpoint import Checkpoint


class Explicit(FineTuning):
    """Fine-tunes the aligned model on harmful rows alone; the task is only scored.

    Attributes:
        n: Harmful rows; with one seed, fewer rows are among more. The papers' are 10, 50, 100.
    """

    adapter: Adapter = "full"
    n: int = Field(100, ge=1)

    @property
    def needs_task(self) -> bool:
        return False

    @property
    def needs_poison(self) -> bool:
        return True

    def check(self, base: Checkpoint, data: AttackData, prefix: str) -> None:
        check_size(len(data.poison), self.n, "harmful", f"{prefix}.n")
        super().check(base, data, prefix)

    def rows(self, data: AttackData, seed: int) -> list[Example]:
        return mix((), data.poison, self.n, 1.0, seed)
