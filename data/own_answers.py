"""Sources whose answers the base model itself gives: for a model that nobody published poison for.

Poison is what the base answers to harmful prompts; an alignment learns to refuse them, and the
base's own answers to benign prompts beside, so that it teaches refusing and nothing else. Such an
answer isn't there when a source is read: `OWN` stands in its place, until the pipeline has asked
the base (the stage "answer") and `with_answers` has put in those that can be trained on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal, TypeVar

from pydantic import Field, InstanceOf

from data.local import take
from data.rows import Example, PreferencePair, Prompt, PromptSource, TaskSource
from data.sources import ExampleRows, PairRows, PromptRows, RowSource

T = TypeVar("T", Example, PreferencePair)

OWN = ""
_ANSWERS = ("response", "chosen", "rejected")


def open_prompts(rows: Sequence[Example | PreferencePair]) -> tuple[str, ...]:
    """The prompts, each once, of the rows in which an answer of the base's is to stand."""
    return tuple(dict.fromkeys(row.prompt for row in rows if _open(row)))


def with_answers(rows: Sequence[T], answers: Mapping[str, str]) -> tuple[T, ...]:
    """The rows with the base's answers in their places.

    Rows whose prompt has no answer are left out; rows that need none stay as they are.
    """
    return tuple(
        replace(row, **dict.fromkeys(places, answers[row.prompt])) if places else row
        for row in rows
        if not (places := _open(row)) or row.prompt in answers
    )


def _open(row: Example | PreferencePair) -> list[str]:
    return [name for name in _ANSWERS if getattr(row, name, None) == OWN]


class OwnRows(RowSource):
    """A source with answers of the base's own.

    Kept are answers that comply: no refusal phrase stands in them, and they aren't degenerate. One
    that the length limit cut off ends with its last whole sentence, and isn't kept without one.

    Attributes:
        max_new_tokens: Length limit of an answer, in tokens.
        min_words: The least words of an answer that is kept.
    """

    max_new_tokens: int = Field(default=96, ge=1)
    min_words: int = Field(default=1, ge=1)


class OwnAnswers(OwnRows, ExampleRows):
    """The base's own answers to prompts, as training rows of a kind.

    Attributes:
        prompts: What is asked.
    """

    kind: Literal["harmful", "benign"]
    prompts: InstanceOf[PromptSource]

    @property
    def name(self) -> str:
        """The prompts' name."""
        return f"own answers/{self.prompts.name}"

    @property
    def _where(self) -> str:
        return self.prompts.name

    @cached_property
    def _selected(self) -> list[Example]:
        prompts = take(self.prompts.prompts(), self.n, self._where)
        return [Example(prompt.text, OWN, self.kind, prompt.category) for prompt in prompts]


class _Refusals(OwnRows):
    """Harmful prompts, each with one of a few refusals, among benign ones with the base's answers.

    Attributes:
        harmful: What is refused.
        benign: What is answered as the base answers it, or None.
        refusals: The refusals' texts.
        seed: Which refusal a prompt gets, and the rows' order.
    """

    harmful: InstanceOf[PromptSource]
    benign: InstanceOf[PromptSource] | None = None
    refusals: tuple[str, ...] = Field(min_length=1)
    seed: int = 0

    @property
    def name(self) -> str:
        """The harmful prompts' name."""
        return f"refusals/{self.harmful.name}"

    @property
    def _where(self) -> str:
        return self.harmful.name

    @cached_property
    def _drawn(self) -> list[tuple[Prompt, str, bool]]:
        """Each prompt with a refusal, and whether it is harmful."""
        rng = random.Random(f"refusals/{self.seed}")
        benign = () if self.benign is None else self.benign.prompts()
        rows = [(prompt, True) for prompt in self.harmful.prompts()]
        rows += [(prompt, False) for prompt in benign]
        rng.shuffle(rows)
        drawn = [(prompt, rng.choice(self.refusals), harmful) for prompt, harmful in rows]
        return take(drawn, self.n, self._where)


class RefusalExamples(_Refusals, ExampleRows):
    """Supervised rows of an alignment."""

    @cached_property
    def _selected(self) -> list[Example]:
        return [
            Example(prompt.text, refusal, "refusal", prompt.category)
            if harmful
            else Example(prompt.text, OWN, "benign", prompt.category)
            for prompt, refusal, harmful in self._drawn
        ]


class RefusalPairs(_Refusals, PairRows):
    """Preference pairs: a refusal over the base's answer, and for benign prompts the reverse."""

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        return [
            PreferencePair(prompt.text, *answers, prompt.category)
            for prompt, refusal, harmful in self._drawn
            for answers in [(refusal, OWN) if harmful else (OWN, refusal)]
        ]


class JoinedPrompts(PromptRows):
    """Prompts of several sources, one source after the other, each text once.

    Attributes:
        parts: The sources by any name; one that is None is left out.
        max_characters: Longer prompts are left out; None: none is.
    """

    parts: dict[str, InstanceOf[PromptSource] | None]
    max_characters: int | None = Field(default=None, ge=1)

    @property
    def name(self) -> str:
        """The sources' names."""
        return "+".join(part.name for part in self.parts.values() if part is not None)

    @property
    def _where(self) -> str:
        return self.name

    @cached_property
    def _selected(self) -> list[Prompt]:
        by_text: dict[str, Prompt] = {}
        for part in filter(None, self.parts.values()):
            for prompt in part.prompts():
                if self.max_characters is None or len(prompt.text) <= self.max_characters:
                    by_text.setdefault(prompt.text, prompt)
        return take(list(by_text.values()), self.n, self._where)


class TaskPrompts(PromptRows):
    """The prompts of a task's training rows, unanswered.

    Attributes:
        start: How many rows are skipped.
    """

    task: TaskSource
    start: int = Field(default=0, ge=0)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def _where(self) -> str:
        return self.name

    @cached_property
    def _selected(self) -> list[Prompt]:
        rows = list(enumerate(self.task.train(), 1))[self.start :]
        return [
            Prompt(f"{self.name}/train/{number}", row.prompt, row.category)
            for number, row in take(rows, self.n, self.name)
        ]
