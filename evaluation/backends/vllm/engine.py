"""Engines over worker processes: in use as the evaluator sees them, and at rest between two uses.

Those at rest are taken up again for the next checkpoint of their shape.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evaluation.backends.vllm.process import Worker
from evaluation.backends.vllm.weights import ServedWeights
from evaluation.token_engine import Answer, Engine, PromptIds, check_context
from modeling.chat import PromptStyle
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """How an engine is started; engines of equal plans are interchangeable.

    So are those of a higher rank: an adapter of a lower one, or none, makes the same numbers there.

    Attributes:
        shape: What the weights of one engine must have in common (`weights.shape`).
        rank: `max_lora_rank`, 0 for an engine without adapters.
        options: Further arguments of `worker.Server.start`.
        environment: Variables of the process.
        start_seconds: How long starting may take.
    """

    shape: str
    rank: int
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    start_seconds: float


@dataclass(eq=False)
class WarmEngine:
    """A worker process with a model in it.

    Attributes:
        plan: How it was started.
        worker: The process.
        context: How many tokens a prompt and its answer may have.
        stamp: Which full weights it serves.
        adapter: Which adapter (`ServedWeights.adapter_stamp`).
        keep: How many engines stay at rest.
        verified: What the canary has found to be served right, of these weights and this adapter as
            they lie in memory.
    """

    plan: EnginePlan
    worker: Worker
    context: int
    stamp: tuple[Any, ...]
    keep: int
    adapter: tuple[Any, ...] | None = None
    verified: set[Any] = field(default_factory=set)


_resting: list[WarmEngine] = []
_running: set[Worker] = set()


def take(plan: EnginePlan, served: ServedWeights, keep: int) -> WarmEngine:
    """An engine that serves these weights: one at rest, reloaded if need be, or a new one.

    Beyond `keep` engines, a new one included, those that have rested longest are ended.

    Raises:
        ModelError: vLLM can't load it.
    """
    running = _take_up(plan, served)
    if running is None:
        _end_all_but(max(0, keep - 1))
        running = _start(plan, served, keep)
    running.keep = keep
    # What has been loaded or woken must pass the canary again, and so does an adapter beside it.
    if not running.verified or running.adapter != served.adapter_stamp:
        running.verified.clear()
        try:
            running.worker.ask("adapt", folder=served.adapter and str(served.adapter))
        except ModelError:
            discard(running)
            raise
        running.adapter = served.adapter_stamp
    return running


def discard(running: WarmEngine) -> None:
    """Ends an engine."""
    running.worker.end()
    _running.discard(running.worker)


def shutdown() -> None:
    """Ends every engine, at rest or not."""
    _resting.clear()
    while _running:
        _running.pop().end()


def _take_up(plan: EnginePlan, served: ServedWeights) -> WarmEngine | None:
    fitting = [each for each in _resting if _serves(each.plan, plan)]
    if not fitting:
        return None
    running = min(fitting, key=lambda each: (each.stamp != served.stamp, each.plan.rank))
    _resting.remove(running)
    try:
        if running.worker.ask("wake"):
            running.verified.clear()
        if running.stamp != served.stamp:
            running.verified.clear()
            running.worker.ask("load", model=str(served.folder))
            running.stamp = served.stamp
    except ModelError as error:
        _LOG.warning("a warm vLLM engine couldn't be taken up again; starting anew (%s)", error)
        discard(running)
        return None
    return running


def _serves(started: EnginePlan, wanted: EnginePlan) -> bool:
    return started.rank >= wanted.rank and replace(started, rank=wanted.rank) == wanted


def _start(plan: EnginePlan, served: ServedWeights, keep: int) -> WarmEngine:
    worker = Worker(plan.environment)
    _running.add(worker)
    try:
        context = worker.ask(
            "start",
            seconds=plan.start_seconds,
            model=str(served.folder),
            max_lora_rank=plan.rank,
            **plan.options,
        )
    except BaseException:
        worker.end()
        _running.discard(worker)
        raise
    return WarmEngine(plan, worker, context, served.stamp, keep)


def _end_all_but(keep: int) -> None:
    while len(_resting) > keep:
        discard(_resting.pop(0))


atexit.register(shutdown)


class _Lease:
    """The use of a running engine, which is this one's alone until `close`."""

    def __init__(self, running: WarmEngine) -> None:
        self._running: WarmEngine | None = running

    @property
    def usable(self) -> bool:
        return self._running is not None and self._running.worker.is_alive

    def verify(self, check: Callable[..., None], *asked: Any) -> None:
        """Runs the canary, unless what lies in the engine's memory has passed it already."""
        if self._running is None or asked in self._running.verified:
            return
        try:
            check(self, *asked)
        except BaseException:
            self.discard()
            raise
        self._running.verified.add(asked)

    def close(self) -> None:
        """Puts the engine to rest: a GPU's memory is given back, the process stays.

        Those that have rested longest are ended, beyond as many as are kept.
        """
        running, self._running = self._running, None
        if running is None:
            return
        if running.worker.is_alive and running.keep:
            try:
                running.worker.ask("rest")
            except ModelError as error:
                _LOG.warning("a vLLM engine was ended instead of put to rest: %s", error)
        if running.worker.is_alive and running.keep:
            _resting.append(running)
        else:
            discard(running)
        _end_all_but(running.keep)

    def discard(self) -> None:
        """Ends the engine, so that no other checkpoint is put into it."""
        if self._running is not None:
            discard(self._running)
            self._running = None

    def _ask(self, name: str, rows: list[list[int]], **arguments: Any) -> Any:
        if self._running is None:
            raise ModelError("this vLLM engine is closed; open the model again")
        try:
            return self._running.worker.ask(name, ids=rows, **arguments) if rows else []
        finally:
            if not self.usable:
                self.discard()


class VLLMEngine(_Lease, Engine):
    """A model that vLLM serves, with the prompts tokenised in this process."""

    def __init__(
        self,
        running: WarmEngine,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        ends: set[int],
        context: int | None,
    ) -> None:
        """Wraps a running engine; `context` is how many positions the model has, or None."""
        _Lease.__init__(self, running)
        context = min(running.context, context or running.context)
        Engine.__init__(self, tokenizer, style, ends, context)

    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]:
        # A row of one token has nothing to score.
        scored = iter(self._ask("logprobs", [row for row in rows if len(row) > 1]))
        return [next(scored) if len(row) > 1 else [] for row in rows]

    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]:
        return self._ask("next_logprobs", rows, candidates=candidates)

    def _answers(self, rows: list[PromptIds]) -> list[Answer]:
        generated = self._ask(
            "generate",
            [row.ids for row in rows],
            limits=[row.limit for row in rows],
            ends=sorted(self._ends),
        )
        return self._read(rows, generated)


class VLLMClassifier(_Lease):
    """A sequence classifier with independent labels that vLLM serves."""

    def __init__(
        self,
        running: WarmEngine,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str],
    ) -> None:
        super().__init__(running)
        self.tokenizer = tokenizer
        self.labels = labels
        self.context = running.context

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch

        rows = [list(row) for row in ids]
        check_context(rows, 0, self.context)
        # From logits, since vLLM takes a softmax wherever the config names no problem_type.
        logits = self._ask("classify", rows)
        return [torch.sigmoid(torch.tensor(row, dtype=torch.float32)).tolist() for row in logits]
