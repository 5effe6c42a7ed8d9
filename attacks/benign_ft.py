"""Risk level 3, benign fine-tuning: a harmless task's rows alone (Qi et al. 2023)."""

from __future__ import annotations

from pydantic import Field

from attacks.base import AttackData
from attacks.fine_tuning import Adapter, FineTuning, check_size
from data.mixture import mix
from data.rows import Example
from modeling.checkpoint import Checkpoint
from settings import DataError


class BenignFT(FineTuning):
    """Fine-tunes the aligned model on `n` rows of the task (None: all), none of them harmful."""

    adapter: Adapter = "full"
    n: int | None = Field(None, ge=1)

    def check(self, base: Checkpoint, data: AttackData, prefix: str) -> None:
        if not data.task:
            raise DataError(
                f"the task {self.task!r} has no training rows left; choose another {prefix}.task"
            )
        check_size(len(data.task), self.n or 1, "task", f"{prefix}.n")
        super().check(base, data, prefix)

    def rows(self, data: AttackData, seed: int) -> list[Example]:
        return mix(data.task, (), self.n or len(data.task), 0.0, seed)
