"""The contracts of the evaluator: what a backend generates and what a judge says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from evaluation.token_engine import Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError, Settings, target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = Literal["safe", "unsafe", "degenerate", "unparsed", "errored"]
Response = Literal["", "compliance", "refusal", "partial"]
_LABELS, _RESPONSES = get_args(Label), get_args(Response)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        label: "safe" or "unsafe", "degenerate" (empty, repetitive or not text), "unparsed" (the
            judge returned nothing that can be read), or "errored" (it couldn't be asked). Only
            "safe" counts as safe.
        score: The judge's own score in its own unit (a probability for the classifier), or NaN.
        category: The category with the highest score, "" where the judge has none.
        truncated: Whether the judge saw a cut-off prompt and answer.
        response: Whether the answer complies, refuses, or does some of both ("partial"; XSTest,
            arXiv 2308.01263); "" where the judge doesn't say.
    """

    label: Label
    score: float
    category: str = ""
    truncated: bool = False
    response: Response = ""


class Classifier(Protocol):
    """A loaded sequence classifier with independent labels.

    Attributes:
        tokenizer: Pads and truncates on the right.
        labels: What the columns of `probabilities` stand for.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: list[str]

    @property
    def usable(self) -> bool:
        """As `Engine.usable`."""
        ...

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Sigmoid scores, one row of len(labels) per sequence of token ids, in their order."""
        ...

    def close(self) -> None: ...


class Backend(Settings):
    """Settings of a way to run models; `open` loads a checkpoint and returns an engine.

    Attributes:
        version: Raised when the same settings give other answers.
        own_process: Whether engines run in processes of their own, so that a stage that uses one
            need not be put into a child process for the sake of memory.
    """

    version: ClassVar[int] = 1
    own_process: ClassVar[bool] = False

    @property
    def rows_at_once(self) -> int:
        """How many rows run through the model together, for estimates of its memory and time."""
        return 1

    def chosen(self, checkpoint: Checkpoint) -> Backend:
        """The backend that runs this checkpoint: itself, unless it is one that chooses."""
        return self

    def identity(self) -> dict[str, Any]:
        """Class, and the settings that answers depend on."""
        return {"_target_": target(self), **self.model_dump(mode="json")}

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuses before heavy work a model that can't be run, in one sentence."""

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, reference: Checkpoint | None = None
    ) -> Engine:
        """Loads a checkpoint.

        Args:
            checkpoint: The model.
            style: How its prompts are rendered.
            reference: The model that this one is an edit of, from which what is served must be
                seen to differ; None where no edit is claimed.
        """
        raise NotImplementedError

    def classifier(self, folder: str, dtype: str) -> Classifier:
        """Loads a sequence classifier with independent labels from a local folder."""
        raise NotImplementedError


class Judge(Settings):
    """A judge: its settings, and `score`, which gives one verdict per answer.

    Attributes:
        version: Raised when the same settings give other verdicts.
        errors_pass: Whether who errored may answer next time, so that verdicts with "errored"
            among them are asked for again and not reused.
    """

    version: ClassVar[int] = 1
    errors_pass: ClassVar[bool] = False

    @property
    def own_process(self) -> bool:
        """Whether what is heavy in it runs in a process of its own (`Backend.own_process`)."""
        return False

    def check(self, setting: str) -> None:
        """Refuses before heavy work what can't be loaded.

        Args:
            setting: What the judge is called in the configuration, for the message, e.g.
                "evaluation.harm_judge".

        Raises:
            ModelError: One sentence that says what to set instead.
            SettingError: Likewise.
        """

    def identity(self) -> dict[str, Any]:
        """The settings that its verdicts depend on (content, not location, of its weights)."""
        return self.model_dump()

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per (prompt, answer); the two sequences are of the same length.

        What is loaded for it stays open for the next call, until `evaluation.engines` closes it.

        Raises:
            SettingError: Prompts and answers differ in number, or a text can't be read.
            ModelError: The judge can't be loaded or asked, or fails.
        """
        raise NotImplementedError


def checked_verdicts(judge: Judge, verdicts: Any, count: int) -> list[Verdict]:
    """What a judge's `score` gave, once it is certain to be a verdict per answer.

    A label or response that nobody knows would count, of every answer, as harmful or as none.

    Raises:
        ModelError: It is none; one sentence.
    """
    called, given = type(judge).__name__, verdicts if isinstance(verdicts, Iterable) else ()
    found = list(given)
    if len(found) != count:
        raise ModelError(
            f"{called} gave {len(found)} verdicts for {count} answers; a judge must give one each, "
            "choose another or mend it"
        )
    for verdict in found:
        if not (isinstance(verdict, Verdict) and isinstance(verdict.score, Real)):
            raise ModelError(
                f"{called} gave {verdict!r}; give an evaluation.base.Verdict whose score is a "
                "number, or NaN"
            )
        for said, known in ((verdict.label, _LABELS), (verdict.response, _RESPONSES)):
            if said not in known:
                listed = ", ".join(map(repr, known))
                raise ModelError(f"{called} gave a verdict of {said!r}; it may be one of {listed}")
    return found


def check_pairs(prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Refuses prompts and answers that are no pairs.

    Raises:
        SettingError: They differ in number.
    """
    if len(prompts) != len(answers):
        raise SettingError(f"{len(prompts)} prompts but {len(answers)} answers were given")
