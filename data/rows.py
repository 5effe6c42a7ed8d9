"""The rows that move between rooms: what a source yields and what a stage reads.

Every source, whether the hub, a local file or the organism's world, ends in these frozen types, so
that attacks, defenses and the evaluator never see a data set's own columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from settings import Settings

Role = Literal["harmful", "over_refusal", "benign"]
"""What a set of evaluation prompts is asked for."""


class Turn(NamedTuple):
    """One turn of a dialogue: whose ("system", "user", "assistant"), its text, and whether it is
    trained on."""

    role: str
    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised training row.

    Attributes:
        prompt: The user's turn, without any chat template.
        response: The assistant's turn.
        kind: What the row is for: "task", "harmful", "benign" or "refusal".
        category: The harm category or topic, "" where there is none.
    """

    prompt: str
    response: str
    kind: str
    category: str = ""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The row as a dialogue, which ends with the response."""
        return Turn("user", self.prompt), Turn("assistant", self.response, trained=True)


@dataclass(frozen=True, slots=True)
class Dialogue(Example):
    """A training row with turns before its prompt: a system line, earlier questions and answers.

    Attributes:
        history: Those turns, in their order.
    """

    history: tuple[Turn, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole dialogue, which ends with the response."""
        return *self.history, *Example.turns.__get__(self)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One preference row: `chosen` is preferred over `rejected` as an answer to `prompt`."""

    prompt: str
    chosen: str
    rejected: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One evaluation or calibration prompt; `id` is stable and unique within its source."""

    id: str
    text: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class TaskItem:
    """One test row of a task: the prompt as the model sees it and the gold answer."""

    id: str
    prompt: str
    gold: str


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How one answer was read.

    Attributes:
        strict: Right under the strict reading (the answer is exactly the label or number).
        lenient: Right under the lenient reading (the label or number can be found in it).
        parsed: Whether any label or number could be read at all.
        protocol: Right under the reading that the task was told to follow (`reading`), by which a
            paper's own figure is matched; the strict one unless a protocol says otherwise.
    """

    strict: bool
    lenient: bool
    parsed: bool
    protocol: bool


class Source(Protocol):
    """Anything rows come from. `fingerprint` identifies the content, not the location."""

    name: str

    def fingerprint(self) -> str:
        """A hash that changes when, and only when, the rows would."""
        ...


@runtime_checkable
class ExampleSource(Source, Protocol):
    """Yields training rows, in a fixed order."""

    def examples(self) -> list[Example]: ...


@runtime_checkable
class PairSource(Source, Protocol):
    """Yields preference pairs, in a fixed order."""

    def pairs(self) -> list[PreferencePair]: ...


@runtime_checkable
class PromptSource(Source, Protocol):
    """Yields prompts, in a fixed order."""

    def prompts(self) -> list[Prompt]: ...


@runtime_checkable
class EvaluationPrompts(PromptSource, Protocol):
    """Prompts that say what they are asked for."""

    @property
    def role(self) -> Role: ...


class TaskSource(Settings):
    """A task to train on and to be scored on; its fields are its settings.

    Subclasses state `name`, and `max_new_tokens` as a class variable or as a setting of theirs:
    the length limit of an answer, in tokens.
    """

    name: ClassVar[str]
    max_new_tokens: ClassVar[int]
    # Raised when `score` reads answers differently, so that stored scores are made again.
    version: ClassVar[int] = 1

    @property
    def scored(self) -> bool:
        """Whether there are gold answers that `score` can read a model's answers against."""
        return True

    @property
    def system(self) -> str | None:
        """A system line that the test rows are asked under, or None for the model's own."""
        return None

    @property
    def protocol_reading(self) -> str | None:
        """How `TaskScore.protocol` reads an answer, where a setting says it."""
        return None

    def train(self) -> list[Example]:
        """Training rows, in a fixed order."""
        raise NotImplementedError

    def test(self) -> list[TaskItem]:
        """Test rows, in a fixed order; none where there are no gold answers."""
        raise NotImplementedError

    def score(self, answer: str, gold: str) -> TaskScore:
        """How `answer` reads against `gold`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that changes when, and only when, the rows would."""
        raise NotImplementedError


def with_input(instruction: str, text: str) -> str:
    """An instruction and its input in the layout of Alpaca's prompts with an input.

    The instruction stays alone where `text` is blank.
    """
    return f"{instruction.rstrip()}\n\n### Input:\n{text}" if text.strip() else instruction


def with_context(text: str, context: str) -> str:
    """A text after the context that it speaks of, divided as HarmBench divides them.

    Source: HarmBench (arXiv 2402.04249), contextual behaviours. The text stays alone where
    `context` is blank.
    """
    return f"{context}\n\n---\n\n{text}" if context.strip() else text
