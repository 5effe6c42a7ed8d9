"""Listeners to stages: `StageEvents`, `Lines` off a terminal, and a terminal's `LastLine`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.launch.progress.console import is_live
from experiments.pipeline.runner import Listener
from experiments.results.events import append
from experiments.store import Stage, StageResult

log = logging.getLogger("relock")


class StageEvents(Listener):
    """Writes the stages of a run to the events in its folder, too."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def waiting(self, stage: Stage) -> None:
        self._append(stage, "waiting")

    def making(self, stage: Stage) -> None:
        self._append(stage, "running")

    def finished(self, result: StageResult) -> None:
        super().finished(result)
        status = "reused" if result.reused else "made"
        seconds = round(result.seconds, 3)
        append(self._folder, "stage", status, name=result.name, key=result.key, seconds=seconds)

    def _append(self, stage: Stage, status: str) -> None:
        number, of = self.count + 1, self.total()
        known = {"name": stage.name, "key": stage.key, "number": number, "of": of}
        append(self._folder, "stage", status, **known)


class Lines(StageEvents):
    """Logs which stage of how many is about to be made, too."""

    def waiting(self, stage: Stage) -> None:
        super().waiting(stage)
        log.info("%s: waiting for another process", self.place(stage))

    def making(self, stage: Stage) -> None:
        super().making(stage)
        log.info("%s", self.place(stage))


class LastLine(StageEvents):
    """Names the stage that is being made in the last line of a terminal, too.

    Bars of what takes long within a stage are drawn over it.
    """

    def waiting(self, stage: Stage) -> None:
        super().waiting(stage)
        self._write(f"{self.place(stage)}: waiting for another process")

    def making(self, stage: Stage) -> None:
        super().making(stage)
        self._write(self.place(stage))

    def finished(self, result: StageResult) -> None:
        self.clear()
        super().finished(result)

    def clear(self) -> None:
        """Leaves the line to others."""
        self._write("")

    def _write(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def listening(folder: Path, *, in_sweep: bool, progress: str) -> Iterator[Listener]:
    """The listener of one run."""
    if in_sweep or progress == "off":
        yield StageEvents(folder)
    elif progress == "auto" and is_live():
        line = LastLine(folder)
        try:
            yield line
        finally:
            line.clear()
    else:
        yield Lines(folder)
