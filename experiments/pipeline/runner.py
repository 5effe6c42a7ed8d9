"""`Runner`, which runs a pipeline's steps through the store, each in a child process if need be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.pipeline.steps.base import AskingStep, Step
from experiments.store import Stage, StageResult, Store
from experiments.store.resource_errors import lower_memory
from settings import RelockError
from settings.process import begin_child

log = logging.getLogger("relock")

_MANY = ("generate", "likelihood", "judge", "score")


class Listener:
    """Is told how the stages of a run go on; this one logs which were made and reused.

    Attributes:
        count: How many have ended.
        total: Says how many there will be; 0 where that isn't known.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Callable[[], int] = lambda: 0

    def place(self, stage: Stage) -> str:
        """Which stage of how many it is."""
        of = f" of {max(self.total(), self.count + 1)}" if self.total() else ""
        return f"stage {self.count + 1}{of}: {stage.name}"

    def waiting(self, stage: Stage) -> None:
        """Another process is making the stage."""

    def making(self, stage: Stage) -> None:
        """The stage is about to be made."""

    def finished(self, result: StageResult) -> None:
        """The stage was made, or found."""
        self.count += 1
        level = logging.DEBUG if result.name in _MANY else logging.INFO
        how = "reused" if result.reused else f"made in {result.seconds:.1f} s"
        log.log(level, "%s %s %s", result.name, result.key, how)


class Runner:
    """Makes what the store doesn't hold.

    `isolate` is whether a step that has no process of its own runs in a child process.
    """

    def __init__(self, store: Store, listener: Listener, *, isolate: bool) -> None:
        self._store = store
        self._listener = listener
        self._isolate = isolate
        self._keys: set[str] = set()
        # Rows that are asked for and not yet written, by the key of their step.
        self._asked: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, step: Step, following: Sequence[Step] = ()) -> StageResult:
        """The result of a step, from the store or made.

        `following` are steps that come next and ask the same model or judge: what the store lacks
        of them is asked in the same pass.

        Raises:
            RelockError: As `Store.run`, or what the step itself says.
        """
        stage = step.stage

        def make(out: Path) -> dict[str, Any] | None:
            self._listener.making(stage)
            if self._isolate and not step.own_process:
                report: dict[str, Any] | None = in_child(partial(step.run, out), stage.name)
                return report
            if not isinstance(step, AskingStep):
                return step.run(out)
            if stage.key not in self._asked:
                pending = [step, *(each for each in following if self._lacks(each))]
                wanted = {each.stage.key: each for each in pending}
                self._asked = dict(zip(wanted, step.ask(list(wanted.values())), strict=True))
            return step.write(self._asked.pop(stage.key), out)

        is_stale = partial(self._is_stale, step)
        result = self._store.run(stage, make, is_stale, lambda: self._listener.waiting(stage))
        self._keys.add(stage.key)
        self._listener.finished(result)
        return result

    def _lacks(self, step: Step) -> bool:
        found = self._store.find(step.stage)
        return found is None or self._is_stale(step, found)

    def _is_stale(self, step: Step, result: StageResult) -> bool:
        # Nobody is asked twice in one run.
        return step.stage.key not in self._keys and step.is_stale(result)


def in_child(function: Callable[[], Any], name: str) -> Any:
    """Calls `function` in a spawned process and returns what it returns.

    The child ends when this process does, however that ends. The function is picklable (a
    `functools.partial` of a module's function); `name` is the stage's, for the message.

    Raises:
        RelockError: The child was killed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin_child) as pool:
        try:
            return pool.submit(function).result()
        except BrokenProcessPool:
            raise RelockError(
                f"the process of stage {name} was killed, most often for want of memory; "
                f"{lower_memory(name)}, or give the machine more memory, then run again"
            ) from None
