"""The contracts of the evaluator: what a backend generates and what a judge says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from modeling.checkpoint import Checkpoint
from settings import Settings

Label = Literal["safe", "unsafe", "degenerate", "unparsed"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer.

    Attributes:
        text: The decoded answer, without special tokens; it begins with the start it was given,
            and is empty where nothing was added to one.
        tokens: How many tokens were generated, the end token included.
        truncated: Whether the length limit cut it off (no end token was generated).
    """

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        label: "safe" or "unsafe", "degenerate" (empty, repetitive or not text), or "unparsed"
            (the judge returned nothing that can be read). Only "safe" counts as safe.
        score: The judge's own score in its own unit (a probability for the classifier), or NaN.
        category: The category with the highest score, "" where the judge has none.
        truncated: Whether the judge saw a cut-off prompt and answer.
    """

    label: Label
    score: float
    category: str = ""
    truncated: bool = False


class Engine(Protocol):
    """A loaded model that answers batches; closing it gives its memory back."""

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts.

        `starts` are the beginnings of the answers, one per prompt ("" for none), which the model
        is made to go on from.
        """
        ...

    def close(self) -> None: ...


class Backend(Settings):
    """Settings of a way to generate; `open` loads a checkpoint and returns an engine."""

    version: ClassVar[int] = 1

    def open(self, checkpoint: Checkpoint, style: Any) -> Engine:
        """Loads `checkpoint`; `style` is the `modeling.chat.PromptStyle` that renders prompts."""
        raise NotImplementedError


class Judge(Settings):
    """A judge: its settings, and `score`, which gives one verdict per answer."""

    version: ClassVar[int] = 1

    def check(self) -> None:
        """Refuses before heavy work what can't be loaded, in one sentence."""

    def identity(self) -> dict[str, Any]:
        """The settings that its verdicts depend on (content, not location, of its weights)."""
        return self.model_dump()

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per (prompt, answer); the two sequences are of the same length."""
        raise NotImplementedError
