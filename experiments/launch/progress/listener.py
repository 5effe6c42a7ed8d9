"""Listeners to stages: `StageEvents` of a sweep's job, and a terminal's `LastLine`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.launch.progress.console import is_live
from experiments.pipeline.runner import Listener
from experiments.results.events import append
from experiments.store import Stage, StageResult


class StageEvents(Listener):
    """Writes the stages of a sweep's job to the events in its folder, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def waiting(self, stage: Stage) -> None:
        append(self._folder, "stage", "waiting", name=stage.name, key=stage.key)

    def making(self, stage: Stage) -> None:
        append(self._folder, "stage", "running", name=stage.name, key=stage.key)

    def finished(self, result: StageResult) -> None:
        super().finished(result)
        status = "reused" if result.reused else "made"
        seconds = round(result.seconds, 3)
        append(self._folder, "stage", status, name=result.name, key=result.key, seconds=seconds)


class LastLine(Listener):
    """Names the stage that is being made in the last line of a terminal, too.

    Bars of what takes long within a stage are drawn over it.
    """

    def __init__(self) -> None:
        self._count = 0

    def waiting(self, stage: Stage) -> None:
        self._write(f"{stage.name}: waiting for another process")

    def making(self, stage: Stage) -> None:
        self._write(f"stage {self._count + 1}: {stage.name}")

    def finished(self, result: StageResult) -> None:
        self._count += 1
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
    if in_sweep:
        yield StageEvents(folder)
    elif progress == "auto" and is_live():
        line = LastLine()
        try:
            yield line
        finally:
            line.clear()
    else:
        yield Listener()
