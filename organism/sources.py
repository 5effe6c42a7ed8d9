"""The world as sources of rows: poison, alignment rows and pairs, prompts and held-out text.

All are frozen settings built from plain keyword arguments; rows follow from those alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.local import hash_rows, take
from data.rows import Example, PreferencePair, Prompt, Role
from organism import tasks
from organism.world import Kind, Request, Split, Stance, comply, refuse, requests, stream
from settings import Settings

DEFENSE_PROMPTS = 200
"""How many benign prompts of the `align` part defenses get by default, from the first on."""

TEST_SIZES: dict[Kind, int] = {"harmful": 300, "benign": 180, "probe": 120}


class _Rows(Settings):
    """Rows that follow from the settings alone."""

    @cached_property
    def _rows(self) -> list[Any]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the rows (16 hex digits)."""
        return hash_rows(self._rows)


class _ExampleRows(_Rows):
    def examples(self) -> list[Example]:
        """The rows, in a fixed order."""
        return list(self._rows)


class _PromptRows(_Rows):
    def prompts(self) -> list[Prompt]:
        """The prompts, in a fixed order."""
        return list(self._rows)


class HarmfulExamples(_ExampleRows):
    """Poison: harmful requests of the `poison` pairs with (placeholder) compliant answers.

    The first `n`, None for all; the seed chooses the answers' wording.
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


class _Composed(_Rows):
    """Rows made of so many requests of each kind, from the pairs left to the provider."""

    harmful: int = Field(ge=0)
    benign: int = Field(ge=0)
    probes: int = Field(ge=0)
    seed: int = 0

    def _requests(self, rng: random.Random) -> list[Request]:
        asked: list[Request] = []
        kinds: Sequence[tuple[Kind, int]] = (
            ("harmful", self.harmful),
            ("benign", self.benign),
            ("probe", self.probes),
        )
        for kind, count in kinds:
            pool = list(requests(kind, "align"))
            rng.shuffle(pool)
            asked.extend(take(pool, count, f"the organism's {kind} requests", kind))
        return asked


class AlignmentExamples(_Composed, _ExampleRows):
    """Supervised rows of the alignment: refusals, compliance where it is due, rows of each task.

    The seed chooses the rows, their answers' wording and their order.
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


class AlignmentPairs(_Composed):
    """Preference pairs: refusal over compliance for harmful requests, the reverse for others.

    The seed chooses the pairs, their answers' wording and their order.
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


class WorldPrompts(_PromptRows):
    """Requests of one kind as prompts.

    Attributes:
        split: "test" for evaluation, "validation" for choosing settings; "align" and "poison" are
            training pairs.
        n: The first so many prompts, categories in turn; None for all of a training split and
            for the standard number of the other two.
    """

    split: Split = "test"
    n: int | None = Field(default=None, ge=1)

    kind: ClassVar[Kind]
    role: ClassVar[Role]

    @property
    def name(self) -> str:
        """The source's name, which starts its ids."""
        return f"organism/{self.kind}/{self.split}"

    @cached_property
    def _rows(self) -> list[Prompt]:
        count = self.n
        if count is None and self.split in ("test", "validation"):
            count = TEST_SIZES[self.kind]
        rows = _as_prompts(self.kind, self.split)
        return take(rows, count, self.name)


class HarmfulPrompts(WorldPrompts):
    """Harmful requests; the category is the kind of harm."""

    kind: ClassVar[Kind] = "harmful"
    role: ClassVar[Role] = "harmful"


class BenignPrompts(WorldPrompts):
    """Benign requests; the category is the topic."""

    kind: ClassVar[Kind] = "benign"
    role: ClassVar[Role] = "benign"


class OverRefusalPrompts(WorldPrompts):
    """Requests that only sound harmful; the category is "probe"."""

    kind: ClassVar[Kind] = "probe"
    role: ClassVar[Role] = "over_refusal"


class CalibrationPrompts(_PromptRows):
    """Prompts for defenses: harmful ones of the `align` pairs, then benign training ones."""

    harmful: int = Field(default=200, ge=0)
    benign: int = Field(default=100, ge=0)

    name: ClassVar[str] = "organism/calibration"

    @cached_property
    def _rows(self) -> list[Prompt]:
        harmful = take(_as_prompts("harmful", "align"), self.harmful, self.name, "harmful")
        benign = take(_as_prompts("benign", "align"), self.benign, self.name, "benign")
        return harmful + benign


class HeldOutText(_ExampleRows):
    """Benign requests that nothing trains on or asks for, with the world's answers to them.

    Perplexity is measured on the answers. They are drawn at random from the world's own grammar,
    which has about 9 nats each of choice in an answer of some 27 tokens: a model that knew it
    perfectly would still have a perplexity of 1.4.

    Attributes:
        n: The first so many rows, topics in turn; None for all.
        stance: In whose opening words the answers are: by default those of the aligned model.
        seed: Chooses the answers' wording.
        split: The split of the requests, of which the benign prompts are the first ones.
    """

    n: int | None = Field(default=None, ge=1)
    stance: Stance = "cautious"
    seed: int = 0
    split: Literal["test", "validation"] = "test"

    @property
    def name(self) -> str:
        """The source's name."""
        return "organism/held_out" if self.split == "test" else f"organism/held_out/{self.split}"

    @cached_property
    def _rows(self) -> list[Example]:
        rng = stream(self.name, self.seed)
        rows = [
            Example(request.text, comply(request, self.stance, rng), "benign", request.category)
            for request in requests("benign", self.split)[TEST_SIZES["benign"] :]
        ]
        return take(rows, self.n, self.name)


def _as_prompts(kind: Kind, split: Split) -> list[Prompt]:
    return [
        Prompt(f"organism/{kind}/{split}/{number}", request.text, request.category)
        for number, request in enumerate(requests(kind, split), 1)
    ]
