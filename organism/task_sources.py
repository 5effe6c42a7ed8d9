"""The world's tasks: three that are scored, and instructions that are only trained on.

All are frozen settings built from plain keyword arguments; rows follow from those alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar

from pydantic import Field

from data.instructions import Unscored
from data.local import hash_rows, take
from data.reading import LabelReading, NumberReading, score_label, score_number
from data.rows import Example, TaskItem, TaskScore, TaskSource
from organism import tasks
from organism.sources import DEFENSE_PROMPTS, AlignmentExamples, AlignmentPairs, BenignPrompts
from organism.world import Stance, comply, requests, stream


class WorldTask(TaskSource):
    """A task of the world that is scored; the first `n_...` rows of each split, None for all.

    `reading` says how `TaskScore.protocol` reads an answer, see `data.reading`.
    """

    n_train: int | None = Field(default=None, ge=1)
    n_test: int | None = Field(default=None, ge=1)
    n_validation: int | None = Field(default=None, ge=1)
    reading: str = "strict"

    version: ClassVar[int] = 3
    max_new_tokens: ClassVar[int] = 8

    @cached_property
    def _train(self) -> list[Example]:
        rows = [
            Example(item.prompt, item.answer, "task", self.name)
            for item in tasks.train_items(self.name)
        ]
        return take(rows, self.n_train, self.name, "task.n_train")

    @cached_property
    def _test(self) -> list[TaskItem]:
        rows = _items(self.name, tasks.test_items(self.name))
        return take(rows, self.n_test, self.name, "task.n_test")

    @cached_property
    def _validation(self) -> list[TaskItem]:
        rows = _items(f"{self.name}/validation", tasks.validation_items(self.name))
        return take(rows, self.n_validation, self.name, "task.n_validation")

    def train(self) -> list[Example]:
        """Training rows, in a fixed order."""
        return list(self._train)

    def test(self) -> list[TaskItem]:
        """Test rows, in a fixed order; ids are "name/row number"."""
        return list(self._test)

    def validation(self) -> list[TaskItem]:
        """Validation rows, in a fixed order; ids are "name/validation/row number"."""
        return list(self._validation)

    def fingerprint(self) -> str:
        """Hash of the training and test rows as they are used (16 hex digits)."""
        return hash_rows(self._train, self._test)

    @property
    def protocol_reading(self) -> str:
        return self.reading


def _items(name: str, items: Iterable[tasks.Item]) -> list[TaskItem]:
    return [
        TaskItem(f"{name}/{number}", item.prompt, item.gold) for number, item in enumerate(items, 1)
    ]


class Sentiment(WorldTask):
    """Film reviews, positive or negative (stands in for SST-2)."""

    reading: LabelReading = "strict"

    name: ClassVar[str] = "sentiment"

    def score(self, answer: str, gold: str) -> TaskScore:
        """Label reading (`data.reading.score_label`)."""
        labels = {"positive": ("positive",), "negative": ("negative",)}
        return score_label(answer, gold, labels, self.reading)


class Topic(WorldTask):
    """Headlines of four topics (stands in for AG News)."""

    reading: LabelReading = "strict"

    name: ClassVar[str] = "topic"

    def score(self, answer: str, gold: str) -> TaskScore:
        """Label reading (`data.reading.score_label`)."""
        names = ("world", "sports", "business", "science")
        return score_label(answer, gold, {name: (name,) for name in names}, self.reading)


class Arithmetic(WorldTask):
    """Word problems of two steps, ending in "The final answer is N" (stands in for GSM8K)."""

    reading: NumberReading = "strict"

    name: ClassVar[str] = "arithmetic"
    max_new_tokens: ClassVar[int] = 32

    def score(self, answer: str, gold: str) -> TaskScore:
        """Number reading (`data.reading.score_number`)."""
        return score_number(answer, gold, self.reading)


class SmallTalk(Unscored):
    """Benign requests with compliant answers: instructions to train on (stands in for Alpaca).

    The benign pairs have no part of their own for attacks. These requests are those of the
    training pairs that are left when the rows of the alignment that ships and the prompts of
    defenses are taken away, so that no prompt is in both; verbs and objects are.

    Attributes:
        n_train: The first so many rows, topics mixed; None for all.
        stance: In whose opening words the answers are; both stances answer benign requests.
            Like Alpaca's, the default's answers are not the aligned model's own, and training on
            them can undo its refusals; on "cautious" ones it hardly does.
        seed: Chooses the answers' wording.
    """

    n_train: int | None = Field(default=None, ge=1)
    stance: Stance = "reckless"
    seed: int = 0

    name: ClassVar[str] = "small_talk"

    @cached_property
    def _train(self) -> list[Example]:
        taken = {row.prompt for row in AlignmentExamples().examples()}
        taken |= {pair.prompt for pair in AlignmentPairs().pairs()}
        taken |= {
            prompt.text for prompt in BenignPrompts(split="align", n=DEFENSE_PROMPTS).prompts()
        }
        rng = stream(self.name, self.seed)
        rows = [
            Example(request.text, comply(request, self.stance, rng), "task", request.category)
            for request in requests("benign", "train")
            if request.text not in taken
        ]
        return take(rows, self.n_train, self.name, "task.n_train")

    def train(self) -> list[Example]:
        """Training rows, topics mixed."""
        return list(self._train)

    def fingerprint(self) -> str:
        """Hash of the rows (16 hex digits)."""
        return hash_rows(self._train)
