"""The bases of judges with weights of their own: where these lie, what runs them, what is asked."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PrivateAttr

from evaluation import engines
from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Backend, Judge, Verdict, check_pairs
from evaluation.degenerate import judged
from evaluation.judges.templates import (
    Instruction,
    PublishedText,
    clip,
    control_ids,
    read_instruction,
)
from evaluation.token_engine import Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, Dtype, resolve
from modeling.inspection import inspect_model
from modeling.loading import load_tokenizer
from modeling.model_files import is_adapter
from settings import ModelError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """The judge's model on this machine and what identifies it."""

    checkpoint: Checkpoint
    identity: str

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the full weights."""
        return json.loads((Path(self.checkpoint.base) / "config.json").read_text())


class WeightsJudge(Judge):
    """A judge that is a model on this machine.

    A subclass says which transformers class it is (`architecture`), how a message calls that
    (`kind`) and what to set `model` to instead (`instead`), and its `name` in records.

    Attributes:
        model: Local folder or hub id of the weights.
        revision: Hub revision, or None for the newest.
        dtype: Precision of the weights.
        backend: Runs it; None for the evaluation's own, or transformers where there is none.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    backend: Backend | None = None

    name: ClassVar[str]
    architecture: ClassVar[str]
    kind: ClassVar[str]
    instead: ClassVar[str]
    _resolved: Weights | None = PrivateAttr(default=None)

    def check(self, setting: str) -> None:
        """Refuses what is incomplete, of another kind, or can't be run by the backend."""
        weights = self._weights(setting)
        classes = weights.config.get("architectures") or []
        if not any(name.endswith(self.architecture) for name in classes):
            raise ModelError(
                f"{setting}.model={self.model!r} is {', '.join(classes) or 'of no known kind'}, "
                f"not a {self.kind}; set it to {self.instead}"
            )
        if "quantization_config" not in weights.config:  # Of those an engine knows more than we do.
            classifier = self.architecture == "ForSequenceClassification"
            inspect_model(weights.checkpoint, f"{setting}.model", classifier=classifier)
        try:
            self._runner.check(weights.checkpoint)
        except (ModelError, SettingError) as error:
            raise type(error)(f"{setting}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What verdicts depend on: content of the weights, not their place, dtype and backend."""
        return {
            "judge": self.name,
            "weights": self._weights().identity,
            "dtype": self.dtype,
            "backend": [self._runner.version, self._runner.identity()],
        }

    @property
    def own_process(self) -> bool:
        return self._runner.own_process

    @property
    def _runner(self) -> Backend:
        return (self.backend or TransformersBackend()).chosen(self._weights().checkpoint)

    def _weights(self, setting: str = "the judge") -> Weights:
        # Kept, since identifying a local folder reads every byte of its weights.
        if self._resolved is None:
            self._resolved = self._resolve(setting)
        return self._resolved

    def _resolve(self, setting: str) -> Weights:
        folder, identity = resolve(self.model, self.revision, f"{setting}.model")
        return Weights(Checkpoint(folder, dtype=self.dtype), identity)


class JudgeRequest(NamedTuple):
    """Token ids from the BOS to where the verdict begins; whether the answer was cut for them."""

    ids: list[int]
    truncated: bool = False


class ModelJudge(WeightsJudge):
    """A judge that is a causal model; a subclass says what it is asked and how it is read.

    A subclass sets `name` and `new_tokens` (the length limit of a reply), and writes `request`
    (token ids of a prompt and an answer; a ModelError where the template can't be read or doesn't
    fit the tokenizer), `read` (the verdict of a reply, "unparsed" if it can't be read), and
    `template_identity` and `reading`, what of these goes into its identity.

    Attributes:
        model: Local folder or hub id of a causal language model, or of a PEFT adapter of one.
    """

    version: ClassVar[int] = 2
    new_tokens: ClassVar[int]
    architecture: ClassVar[str] = "ForCausalLM"
    kind: ClassVar[str] = "causal language model"
    instead: ClassVar[str] = "the judge's own"

    def request(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> JudgeRequest:
        raise NotImplementedError

    def read(self, reply: str) -> Verdict:
        raise NotImplementedError

    def template_identity(self) -> dict[str, str]:
        raise NotImplementedError

    def reading(self) -> dict[str, Any]:
        return {}

    def check(self, setting: str) -> None:
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
        asked = self.ask(engine, [requests[row].ids for row in fit]) if fit else []
        verdicts = dict(zip(fit, asked, strict=True))
        final = [Verdict("degenerate", math.nan)] * len(answers)
        for row, request in requests.items():
            verdict = judged(answers[row], verdicts.get(row, Verdict("errored", math.nan)))
            final[row] = replace(verdict, truncated=request.truncated)
        return final

    def ask(self, engine: Engine, ids: Sequence[Sequence[int]]) -> list[Verdict]:
        """The verdicts of the judge's greedy replies."""
        return [self.read(reply.text) for reply in engine.complete(ids, self.new_tokens)]

    def _askable(self, engine: Engine, requests: dict[int, JudgeRequest]) -> list[int]:
        """The rows that fit the context and hold no control token but the template's own."""
        tokenizer = engine.tokenizer
        controls = control_ids(tokenizer) - {tokenizer.unk_token_id}
        usual = _counted(self.request(tokenizer, "request", "answer").ids, controls)
        positions = self._weights().config.get("max_position_embeddings")
        longest = (engine.context or positions or math.inf) - self.new_tokens
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
        self._weights(setting)
        self._instruction(f"{setting}.template")
        super().check(setting)

    def request(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> JudgeRequest:
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


def _counted(ids: Sequence[int], of: set[int]) -> Counter[int]:
    return Counter(token for token in ids if token in of)
