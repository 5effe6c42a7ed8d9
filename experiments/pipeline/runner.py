"""`Runner`, which runs a pipeline's steps through the store, and `Listener`, which is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from experiments.pipeline.isolation import in_child
from experiments.pipeline.steps.base import Step
from experiments.store import Stage, StageResult, Store


class Listener:
    """Is told how the stages of a run go on; this one does nothing about it."""

    def waiting(self, stage: Stage) -> None:
        """Another process is making the stage."""

    def making(self, stage: Stage) -> None:
        """The stage is about to be made."""

    def finished(self, result: StageResult) -> None:
        """The stage was made, or found."""


class Runner:
    """Makes what the store doesn't hold.

    Args:
        store: Holds the results.
        listener: Is told of them.
        isolate: Whether each step that has no process of its own runs in a child process.
    """

    def __init__(self, store: Store, listener: Listener, *, isolate: bool) -> None:
        self._store = store
        self._listener = listener
        self._isolate = isolate
        self._keys: set[str] = set()

    def __call__(self, step: Step) -> StageResult:
        """The result of a step, from the store or made.

        Raises:
            RelockError: As `Store.run`, or what the step itself says.
        """
        stage = step.stage

        def make(out: Path) -> dict[str, Any] | None:
            self._listener.making(stage)
            if self._isolate and not step.own_process:
                report: dict[str, Any] | None = in_child(partial(step.run, out), stage.name)
                return report
            return step.run(out)

        def is_stale(result: StageResult) -> bool:
            # Nobody is asked twice in one run.
            return stage.key not in self._keys and step.is_stale(result)

        result = self._store.run(stage, make, is_stale, lambda: self._listener.waiting(stage))
        self._keys.add(stage.key)
        self._listener.finished(result)
        return result
