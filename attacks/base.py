"""The contract of an attack: a model and data in, the attacked model and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from attacks.prompts import AttackPrompt
from data.local import hash_rows
from data.rows import Example
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.training import LoraSettings, TrainSettings
from settings import Settings


@dataclass(frozen=True)
class AttackData:
    """The rows an attack may draw on, after those shared with the evaluation were dropped.

    Attributes:
        task: Training rows of the task; empty where the attack needs none.
        poison: Harmful rows; empty where the attack needs none.
        leaked: How many rows were dropped because the evaluation asks their prompt.
    """

    task: Sequence[Example]
    poison: Sequence[Example]
    leaked: int = 0

    @cached_property
    def hashes(self) -> list[str]:
        """Hashes of the task's and of the harmful rows; once for all that share these data."""
        return [hash_rows(self.task), hash_rows(self.poison)]


class Attack(Settings):
    """Something that breaks a model's safety; its fields are its settings.

    The model may be the aligned one, or a defended one that is fine-tuned again.  `version` is
    raised when the code changes what `run` produces.
    """

    version: ClassVar[int] = 1

    # An option of `conf/task`; None where none is scored.
    task: str | None

    @property
    def needs_task(self) -> bool:
        """Whether `run` will ask for the task's rows."""
        return True

    @property
    def needs_poison(self) -> bool:
        """Whether `run` will ask for harmful rows."""
        return False

    @property
    def needs_full_weights(self) -> bool:
        """Whether the aligned model's adapter must be merged before `run`."""
        return False

    @property
    def writes_full_weights(self) -> bool:
        """Whether `run` leaves full weights rather than an adapter."""
        return False

    @property
    def fresh_lora(self) -> LoraSettings | None:
        """The LoRA that `run` begins; None where it goes on training one, or all weights."""
        return None

    @property
    def training(self) -> TrainSettings | None:
        """How `run` trains on `rows`; None for an attack that isn't a fine-tuning."""
        return None

    @property
    def system(self) -> str | None:
        """A system line that the attack trains under, or None."""
        return None

    @property
    def trigger(self) -> AttackPrompt | None:
        """What harmful prompts are asked under too, since it calls up what was trained."""
        return None

    def rows(self, data: AttackData, seed: int) -> list[Example]:
        """The rows that are trained on, the same for the same seed; none where nothing is."""
        return []

    def check(self, base: Checkpoint, data: AttackData, prefix: str) -> None:
        """Refuses, before heavy work, a model and data that `run` can't do with.

        Args:
            base: The model before alignment, whose architecture the aligned one has.
            data: What `run` will get.
            prefix: Where its settings stand, for the message: "attack" or "refine".

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

        Args:
            aligned: What is attacked: full weights, or an adapter where it needs none; where it
                is steered, its hooks stay on and its steering stays the checkpoint's.
            data: The rows.
            style: Renders prompts.
            seed: Which rows, their order, and a fresh adapter's start.
            out: The folder to write.
            scratch: A folder the trainer may write to.

        Returns:
            The report: loss curve and rows by kind.
        """
        raise NotImplementedError
