"""Warm engines: those at rest are taken up again for the next checkpoint of their shape."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evaluation.backends.vllm.process import Worker
from evaluation.backends.vllm.weights import ServedWeights
from settings import ModelError

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


def rest(running: WarmEngine) -> None:
    """Puts an engine to rest, and ends those that have rested longest beyond its `keep`."""
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
        started = worker.ask(
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
    return WarmEngine(plan, worker, started["context"], served.stamp, keep)


def _end_all_but(keep: int) -> None:
    while len(_resting) > keep:
        discard(_resting.pop(0))


atexit.register(shutdown)
