"""Who writes to the terminal while a sweep runs: its one view, and not every job."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from hydra.types import RunMode

LIVE = "RELOCK_LIVE_VIEW"
"""In the environment of a live view's process, and of those that it starts: its process id."""

OUTPUT = "output.log"
"""What a job has printed instead, in its folder."""

_SILENT = logging.CRITICAL + 1


class JobConsole(logging.StreamHandler[TextIO]):
    """A job's log on the standard output; the file beside it is always complete.

    A job of a sweep leaves what is not a warning to the sweep's view, and a worker process on the
    terminal of a live view writes nothing at all, which the view would be garbled by.
    """

    def __init__(self, mode: Any, progress: Any) -> None:
        super().__init__(sys.stdout)
        self.setLevel(logging.INFO)
        if viewed(mode, progress):
            self.setLevel(_SILENT if _beside_a_live_view() else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes to what is the standard output by now: a live view takes its place."""
        self.stream = sys.stdout
        super().emit(record)


def viewed(mode: Any, progress: Any) -> bool:
    """Whether a job is of a sweep that has a view, which says what became of the job."""
    return mode == RunMode.MULTIRUN and progress in ("auto", "plain")


def is_live() -> bool:
    """Whether the standard output is a terminal on which lines can be drawn over."""
    if not sys.stdout.isatty():
        return False
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def leave_terminal(folder: Path) -> None:
    """Sends what this process prints to a file, if it has the terminal of another's live view.

    Libraries write there past any handler: warnings, bars, blank lines.
    """
    if not _beside_a_live_view():
        return
    handle = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(handle, stream.fileno())
    os.close(handle)


def _beside_a_live_view() -> bool:
    return os.environ.get(LIVE, str(os.getpid())) != str(os.getpid())
