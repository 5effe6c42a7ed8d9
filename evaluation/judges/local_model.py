"""The base of judges that are causal models: weights, token ids in, a reply or scores out."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from evaluation import engines
from evaluation.base import Verdict, check_pairs
from evaluation.degenerate import judged
from evaluation.judges.templates import (
    Instruction,
    PublishedText,
    clip,
    control_ids,
    read_instruction,
)
from evaluation.judges.weights import Weights, WeightsJudge
from evaluation.token_engine import Answer, Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, resolve
from modeling.loading import load_tokenizer
from modeling.model_files import is_adapter
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """What the judge is asked about one answer.

    Attributes:
        ids: Token ids, from the BOS to where the verdict begins.
        truncated: Whether the answer was cut to make them.
    """

    ids: list[int]
    truncated: bool = False


class ModelJudge(WeightsJudge):
    """A judge that is a causal model; a subclass says what it is asked and how it is read.

    A subclass sets `name` and `new_tokens` (the length limit of a reply), and writes `request`
    (token ids of a prompt and an answer), `read` (the verdict of a reply), and `template_identity`
    and `reading`, what of these goes into its identity.

    Attributes:
        model: Local folder or hub id of a causal language model, or of a PEFT adapter of one.
    """

    version: ClassVar[int] = 2
    new_tokens: ClassVar[int]
    architecture: ClassVar[str] = "ForCausalLM"
    kind: ClassVar[str] = "causal language model"
    instead: ClassVar[str] = "the judge's own"

    def request(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> JudgeRequest:
        """What the judge is asked about an answer.

        Raises:
            ModelError: The template can't be read or doesn't fit the tokenizer.
        """
        raise NotImplementedError

    def read(self, reply: str) -> Verdict:
        """The verdict of a reply, "unparsed" with the score NaN if it can't be read."""
        raise NotImplementedError

    def template_identity(self) -> dict[str, str]:
        """Hash and source of the text the judge is asked with."""
        raise NotImplementedError

    def reading(self) -> dict[str, Any]:
        """The settings that what is asked and how it is read depend on."""
        return {}

    def check(self, setting: str) -> None:
        """Refuses what is no causal model, can't be run, or whose template can't be read.

        Raises:
            ModelError: One sentence that says what to set instead.
        """
        super().check(setting)
        try:
            self.request(self._tokenizer(), "request", "answer")
        except ModelError as error:
            raise ModelError(f"{setting}: {error}") from error
        except (OSError, ValueError, NotImplementedError) as error:
            raise ModelError(
                f"{setting}.model={self.model!r} has a tokenizer that can't be used ({error}); "
                "save or download the model again"
            ) from error

    def identity(self) -> dict[str, Any]:
        """Content of weights and template, how a reply is read, and the backend."""
        return {
            **super().identity(),
            "template": self.template_identity(),
            "reading": self.reading(),
        }

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per pair.

        Degenerate answers are judged too, so that published shares can be computed, but their
        label is "degenerate" and they have no response; an empty one isn't asked about. "errored"
        is a pair that doesn't fit the judge's context, or whose text would have become control
        tokens.

        Raises:
            SettingError: Prompts and answers differ in number.
            ModelError: The judge can't be loaded or fails.
        """
        check_pairs(prompts, answers)
        if not any(answer.strip() for answer in answers):
            return [Verdict("degenerate", math.nan)] * len(answers)
        engine = engines.engine(self._runner, self._weights().checkpoint, PromptStyle())
        requests = {
            row: self.request(engine.tokenizer, prompt, answer)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            if answer.strip()
        }
        fit = self._askable(engine, requests)
        verdicts = dict(zip(fit, self.ask(engine, [requests[row].ids for row in fit]), strict=True))
        return [
            _final(answer, requests.get(row), verdicts.get(row))
            for row, answer in enumerate(answers)
        ]

    def ask(self, engine: Engine, ids: Sequence[Sequence[int]]) -> list[Verdict]:
        """The verdicts of the judge's greedy replies."""
        return [self.read(reply.text) for reply in self._complete(engine, ids)]

    def _complete(self, engine: Engine, ids: Sequence[Sequence[int]]) -> list[Answer]:
        return engine.complete(ids, self.new_tokens) if ids else []

    def _askable(self, engine: Engine, requests: dict[int, JudgeRequest]) -> list[int]:
        """The rows that fit the context and hold no control token but the template's own."""
        tokenizer = engine.tokenizer
        controls = control_ids(tokenizer) - {tokenizer.unk_token_id}
        usual = _counted(self.request(tokenizer, "request", "answer").ids, controls)
        context = engine.context or self._positions()
        longest = context - self.new_tokens
        fit = [
            row
            for row, request in requests.items()
            if len(request.ids) <= longest and _counted(request.ids, controls) == usual
        ]
        if len(fit) < len(requests):
            _LOG.warning(
                "%d of %d answers can't be put to the judge %s and count as errored",
                len(requests) - len(fit),
                len(requests),
                self.name,
            )
        return fit

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._weights().checkpoint)

    def _positions(self) -> float:
        return float(self._weights().config.get("max_position_embeddings") or math.inf)

    def _resolve(self, setting: str) -> Weights:
        weights = super()._resolve(setting)
        folder = weights.checkpoint.base
        if not is_adapter(folder):
            return weights
        name, revision = self._adapted(folder, setting)
        base, base_identity = resolve(name, revision, f"{setting}.base")
        return Weights(
            Checkpoint(base, adapter=folder, dtype=self.dtype),
            f"{weights.identity} on {base_identity}",
        )

    def _adapted(self, folder: str, setting: str) -> tuple[str, str | None]:
        """Name and revision of the model that an adapter is made for."""
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if not config.get("base_model_name_or_path"):
            raise ModelError(
                f"{setting}.model={self.model!r} is an adapter that names no base model; "
                "set it to one that does, or to the merged model"
            )
        return config["base_model_name_or_path"], config.get("revision")


class InstructedJudge(ModelJudge):
    """A judge with a published instruction text around the prompt and the answer.

    A subclass sets `published`, and `keeps`, the end of a long answer that the judge sees.

    Attributes:
        template: A file that holds the instruction text, or a copy of the model card or file that
            it is published in; None to look beside the weights and then where it is published.
        max_answer_tokens: Tokens of the answer that the judge sees; None for all of them.
    """

    template: str | None = None
    max_answer_tokens: int | None = Field(default=None, ge=1)

    published: ClassVar[PublishedText]
    keeps: ClassVar[Literal["start", "end"]] = "start"
    _text: Instruction | None = PrivateAttr(default=None)

    def check(self, setting: str) -> None:
        """Refuses what is no causal model, can't be run, or whose template can't be read.

        Raises:
            ModelError: One sentence that says what to set instead.
        """
        self._weights(setting)
        self._instruction(f"{setting}.template")
        super().check(setting)

    def request(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> JudgeRequest:
        """Token ids of the instruction text with the prompt and the clipped answer.

        Raises:
            ModelError: The text can't be read.
        """
        truncated, opener = False, self.opener(tokenizer)
        if self.max_answer_tokens is not None:
            limit = self.max_answer_tokens - bool(opener)
            answer, truncated = clip(tokenizer, answer, limit, self.keeps)
        ids = self._instruction().encode(tokenizer, prompt, answer, opener)
        return JudgeRequest(ids, truncated)

    def opener(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the judge's authors write right before the answer; a token of its limit."""
        return ""

    def template_identity(self) -> dict[str, str]:
        """SHA-256 of the instruction text and where it was read."""
        return self._instruction().identity()

    def reading(self) -> dict[str, Any]:
        """The limits of answer and reply, and which end of the answer is kept."""
        return {
            "max_answer_tokens": self.max_answer_tokens,
            "keeps": self.keeps,
            "new_tokens": self.new_tokens,
        }

    def _instruction(self, setting: str = "the judge's template") -> Instruction:
        if self._text is None:
            folder = self._weights().checkpoint.base
            revision = self.revision if self.model == self.published.place else None
            self._text = read_instruction(self.published, self.template, folder, revision, setting)
        return self._text


def _final(answer: str, request: JudgeRequest | None, verdict: Verdict | None) -> Verdict:
    if request is None:
        return Verdict("degenerate", math.nan)
    verdict = judged(answer, verdict or Verdict("errored", math.nan))
    return replace(verdict, truncated=request.truncated)


def _counted(ids: Sequence[int], of: set[int]) -> Counter[int]:
    return Counter(token for token in ids if token in of)
