"""The contract of an attack: aligned model and data in, attacked model and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.rows import Example
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import Settings


@dataclass(frozen=True, slots=True)
class AttackData:
    """The rows an attack may draw on, after those shared with the evaluation were dropped.

    Attributes:
        task: Training rows of the task.
        poison: Harmful rows; empty where the attack needs none.
        leaked: How many rows were dropped because the evaluation asks their prompt.
    """

    task: Sequence[Example]
    poison: Sequence[Example]
    leaked: int = 0


class Attack(Settings):
    """Something that breaks a model's safety; its fields are its settings.

    `version` is raised when the code changes what `run` produces.
    """

    version: ClassVar[int] = 1

    task: str

    @property
    def needs_poison(self) -> bool:
        """Whether `run` will ask for harmful rows."""
        return False

    @property
    def needs_full_weights(self) -> bool:
        """Whether the aligned model's adapter must be merged before `run`."""
        return False

    def check(self, base: Checkpoint, data: AttackData) -> None:
        """Refuses, before heavy work, a model and data that `run` can't do with.

        Args:
            base: The model before alignment, whose architecture the aligned one has.
            data: What `run` will get.

        Raises:
            DataError: One sentence that says what is missing.
            SettingError: One sentence that says what to set instead.
        """

    def run(
        self,
        aligned: Checkpoint,
        data: AttackData,
        style: PromptStyle,
        seed: int,
        out: Path,
        scratch: Path,
    ) -> dict[str, Any]:
        """Attacks `aligned` and writes a plain model or adapter folder to `out`.

        Returns:
            The report: loss curve and rows by kind.
        """
        raise NotImplementedError
