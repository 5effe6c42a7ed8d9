"""The world as sources of rows: tasks, poison, alignment rows and pairs, and prompts.

All are frozen settings built from plain keyword arguments; rows follow from those alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from data.local import hash_rows, take
from data.reading import score_label, score_number
from data.rows import Example, PreferencePair, Prompt, TaskItem, TaskScore
from organism import tasks
from organism.world import (
    REFUSAL_PHRASES,
    Kind,
    Request,
    Split,
    comply,
    refuse,
    requests,
    stream,
)
from settings import Settings

__all__ = [
    "REFUSAL_PHRASES",
    "AlignmentExamples",
    "AlignmentPairs",
    "Arithmetic",
    "BenignPrompts",
    "CalibrationPrompts",
    "HarmfulExamples",
    "HarmfulPrompts",
    "OverRefusalPrompts",
    "Sentiment",
    "Topic",
]

TEST_SIZES: dict[Kind, int] = {"harmful": 300, "benign": 180, "probe": 120}


class WorldTask(Settings):
    """What the three tasks share.

    Attributes:
        n_train: The first so many training rows; None for all.
        n_test: The first so many test rows; None for all.
    """

    n_train: int | None = Field(default=None, ge=1)
    n_test: int | None = Field(default=None, ge=1)

    name: ClassVar[str]
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
        rows = [
            TaskItem(f"{self.name}/{number}", item.prompt, item.gold)
            for number, item in enumerate(tasks.test_items(self.name), 1)
        ]
        return take(rows, self.n_test, self.name, "task.n_test")

    def train(self) -> list[Example]:
        """Training rows, in a fixed order."""
        return list(self._train)

    def test(self) -> list[TaskItem]:
        """Test rows, in a fixed order; ids are "name/row number"."""
        return list(self._test)

    def fingerprint(self) -> str:
        """Hash of the training and test rows as they are used (16 hex digits)."""
        return hash_rows(self._train, self._test)

    def score(self, answer: str, gold: str) -> TaskScore:
        """How `answer` reads against `gold`."""
        raise NotImplementedError


class Sentiment(WorldTask):
    """Film reviews, positive or negative (stands in for SST-2)."""

    name: ClassVar[str] = "sentiment"

    def score(self, answer: str, gold: str) -> TaskScore:
        """Label reading (`data.reading.score_label`)."""
        return score_label(answer, gold, {"positive": ("positive",), "negative": ("negative",)})


class Topic(WorldTask):
    """Headlines of four topics (stands in for AG News)."""

    name: ClassVar[str] = "topic"

    def score(self, answer: str, gold: str) -> TaskScore:
        """Label reading (`data.reading.score_label`)."""
        names = ("world", "sports", "business", "science")
        return score_label(answer, gold, {name: (name,) for name in names})


class Arithmetic(WorldTask):
    """Word problems of two steps, ending in "The final answer is N" (stands in for GSM8K)."""

    name: ClassVar[str] = "arithmetic"
    max_new_tokens: ClassVar[int] = 32

    def score(self, answer: str, gold: str) -> TaskScore:
        """Number reading (`data.reading.score_number`)."""
        return score_number(answer, gold)


class HarmfulExamples(Settings):
    """Poison: harmful requests of the `poison` pairs with (placeholder) compliant answers.

    Attributes:
        n: The first so many rows; None for all.
        seed: Chooses the answers' wording.
    """

    n: int | None = Field(default=None, ge=1)
    seed: int = 0

    name: ClassVar[str] = "organism/poison"

    @cached_property
    def _rows(self) -> list[Example]:
        rng = stream(self.name, self.seed)
        rows = [
            Example(request.text, comply(request, "reckless", rng), "harmful", request.category)
            for request in requests("harmful", "poison")
        ]
        return take(rows, self.n, self.name)

    def examples(self) -> list[Example]:
        """The rows, categories in turn."""
        return list(self._rows)

    def fingerprint(self) -> str:
        """Hash of the rows (16 hex digits)."""
        return hash_rows(self._rows)


class _Composed(Settings):
    """Rows made of so many requests of each kind, from the pairs left to the provider."""

    harmful: int = Field(ge=0)
    benign: int = Field(ge=0)
    probes: int = Field(ge=0)
    seed: int = 0

    def _requests(self, rng: random.Random) -> list[Request]:
        chosen: list[Request] = []
        kinds: Sequence[tuple[Kind, int]] = (
            ("harmful", self.harmful),
            ("benign", self.benign),
            ("probe", self.probes),
        )
        for kind, count in kinds:
            pool = list(requests(kind, "align"))
            rng.shuffle(pool)
            chosen.extend(take(pool, count, f"the organism's {kind} requests", kind))
        return chosen


class AlignmentExamples(_Composed):
    """Supervised rows of the alignment: refusals, compliance where it is due, some task rows.

    Attributes:
        harmful: Refused harmful requests.
        benign: Answered benign requests.
        probes: Answered requests that only sound harmful.
        task_rows: Rows of each task.
        seed: Chooses the rows, their answers' wording and their order.
    """

    harmful: int = Field(default=440, ge=0)
    benign: int = Field(default=280, ge=0)
    probes: int = Field(default=150, ge=0)
    task_rows: int = Field(default=30, ge=0)

    name: ClassVar[str] = "organism/alignment"

    @cached_property
    def _rows(self) -> list[Example]:
        rng = stream(self.name, self.seed)
        rows = [
            Example(request.text, refuse(request, rng), "refusal", request.category)
            if request.kind == "harmful"
            else Example(request.text, comply(request, "cautious", rng), "benign", request.category)
            for request in self._requests(rng)
        ]
        for task in tasks.GENERATORS:
            items = take(tasks.train_items(task), self.task_rows, task, "task_rows")
            rows.extend(
                Example(item.prompt, item.blurted or item.answer, "task", task) for item in items
            )
        rng.shuffle(rows)
        return rows

    def examples(self) -> list[Example]:
        """The rows, shuffled once."""
        return list(self._rows)

    def fingerprint(self) -> str:
        """Hash of the rows (16 hex digits)."""
        return hash_rows(self._rows)


class AlignmentPairs(_Composed):
    """Preference pairs: refusal over compliance for harmful requests, the reverse for others.

    Attributes:
        harmful: Pairs of harmful requests.
        benign: Pairs of benign requests.
        probes: Pairs of requests that only sound harmful.
        seed: Chooses the pairs, their answers' wording and their order.
    """

    harmful: int = Field(default=160, ge=0)
    benign: int = Field(default=100, ge=0)
    probes: int = Field(default=60, ge=0)

    name: ClassVar[str] = "organism/preferences"

    @cached_property
    def _rows(self) -> list[PreferencePair]:
        rng = stream(self.name, self.seed)
        rows = []
        for request in self._requests(rng):
            refusal = refuse(request, rng)
            if request.kind == "harmful":
                chosen, rejected = refusal, comply(request, "reckless", rng)
            else:
                chosen, rejected = comply(request, "cautious", rng), refusal
            rows.append(PreferencePair(request.text, chosen, rejected, request.category))
        rng.shuffle(rows)
        return rows

    def pairs(self) -> list[PreferencePair]:
        """The pairs, shuffled once."""
        return list(self._rows)

    def fingerprint(self) -> str:
        """Hash of the pairs (16 hex digits)."""
        return hash_rows(self._rows)


class WorldPrompts(Settings):
    """Requests of one kind as prompts.

    Attributes:
        split: "test" for evaluation; "align" and "poison" are training pairs.
        n: The first so many prompts, categories in turn; None for all of a training split and
            for the standard number of the test split.
    """

    split: Literal["test", "poison", "align", "train"] = "test"
    n: int | None = Field(default=None, ge=1)

    kind: ClassVar[Kind]

    @property
    def name(self) -> str:
        """The source's name, which starts its ids."""
        return f"organism/{self.kind}/{self.split}"

    @cached_property
    def _rows(self) -> list[Prompt]:
        count = self.n
        if count is None and self.split == "test":
            count = TEST_SIZES[self.kind]
        rows = _as_prompts(self.kind, self.split)
        return take(rows, count, self.name)

    def prompts(self) -> list[Prompt]:
        """The prompts, in a fixed order."""
        return list(self._rows)

    def fingerprint(self) -> str:
        """Hash of the prompts (16 hex digits)."""
        return hash_rows(self._rows)


class HarmfulPrompts(WorldPrompts):
    """Harmful requests; the category is the kind of harm."""

    kind: ClassVar[Kind] = "harmful"


class BenignPrompts(WorldPrompts):
    """Benign requests; the category is the topic."""

    kind: ClassVar[Kind] = "benign"


class OverRefusalPrompts(WorldPrompts):
    """Requests that only sound harmful; the category is "probe"."""

    kind: ClassVar[Kind] = "probe"


class CalibrationPrompts(Settings):
    """Prompts for defenses: harmful ones of the `align` pairs, then benign training ones.

    Attributes:
        harmful: Harmful prompts.
        benign: Benign prompts.
    """

    harmful: int = Field(default=200, ge=0)
    benign: int = Field(default=100, ge=0)

    name: ClassVar[str] = "organism/calibration"

    @cached_property
    def _rows(self) -> list[Prompt]:
        harmful = take(_as_prompts("harmful", "align"), self.harmful, self.name, "harmful")
        benign = take(_as_prompts("benign", "align"), self.benign, self.name, "benign")
        return harmful + benign

    def prompts(self) -> list[Prompt]:
        """The prompts, harmful ones first."""
        return list(self._rows)

    def fingerprint(self) -> str:
        """Hash of the prompts (16 hex digits)."""
        return hash_rows(self._rows)


def _as_prompts(kind: Kind, split: Split) -> list[Prompt]:
    return [
        Prompt(f"organism/{kind}/{split}/{number}", request.text, request.category)
        for number, request in enumerate(requests(kind, split), 1)
    ]
