"""Watching a sweep until it ends: a live view on a terminal, elsewhere a line per job."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.launch.progress.console import LIVE, is_live
from experiments.launch.progress.state import ENDED, JobState, SweepState
from experiments.launch.progress.view import drawing, ended_line, whole_line
from experiments.results.events import append

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

log = logging.getLogger("relock")

_EVERY = 0.5


class Watch:
    """Shows how far a sweep is.

    Args:
        folder: The sweep's folder.
        live: Whether to draw one view over and over; else there is a line per job that ends.
    """

    def __init__(self, folder: Path, live: bool) -> None:
        self.sweep = SweepState(folder)
        self._shown: set[int] = set()
        self._console: Console | None = None
        self._live: Live | None = None
        if live:
            from rich.console import Console
            from rich.live import Live

            self._console = Console()
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Watch:
        self.sweep.refresh()
        self._shown = {job.number for job in self.sweep.of(*ENDED)}
        if self._live is not None:
            self._live.start()
            for stream in (sys.stdout, sys.stderr):
                # Or libraries would draw their bars beside the view.
                setattr(stream, "isatty", lambda: False)  # noqa: B010
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self) -> bool:
        """Reads the sweep's state and shows it; returns whether the sweep goes on."""
        self.sweep.refresh()
        ended = [job for job in self.sweep.of(*ENDED) if job.number not in self._shown]
        for job in sorted(ended, key=lambda job: job.end or 0.0):
            self._shown.add(job.number)
            self._say(job)
        if self._live is not None and self._console is not None:
            self._live.update(drawing(self.sweep, self._console.height), refresh=True)
        return not self.sweep.ended

    def until_end(self, stop: threading.Event) -> None:
        """Shows the state again and again, until the sweep has ended or `stop` is set."""
        while self.show() and not stop.wait(_EVERY):
            pass

    def _say(self, job: JobState) -> None:
        reason = f"error: {job.reason}" if job.status == "failed" else ""
        if self._console is None:
            print(whole_line(self.sweep, job, len(self._shown)), flush=True)
            if reason:
                print(reason, file=sys.stderr, flush=True)
            return
        from rich.text import Text

        line = ended_line(self.sweep, job, len(self._shown))
        style = "" if job.status == "done" else "red"
        for text in filter(None, (line, reason)):
            # A style of `print` would be the view's, too.
            self._console.print(Text(text, style=style), soft_wrap=True)


class View:
    """The view of a sweep that runs in this process; `stop` may be called twice."""

    def __init__(self, folder: Path, progress: str, jobs: dict[str, Any]) -> None:
        """Begins to watch.

        Args:
            folder: The sweep's folder.
            progress: "auto", "plain" or "off".
            jobs: What is known of its jobs: total, varies, numbers.
        """
        folder.mkdir(parents=True, exist_ok=True)
        here = {"host": socket.gethostname(), "pid": os.getpid()}
        append(folder, "sweep", "started", **here, **jobs)
        self._folder = folder
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._running = True
        if progress == "off":
            return
        live = progress == "auto" and is_live()
        self._watch = Watch(folder, live)
        if live:
            os.environ[LIVE] = str(os.getpid())
        self._watch.__enter__()
        self._thread = threading.Thread(target=self._go, name="progress", daemon=True)
        self._thread.start()

    def stop(self, *, ended: bool = True) -> None:
        """Says what is left to say, and leaves the terminal as it was.

        Args:
            ended: Whether the sweep has ended, too.
        """
        if not self._running:
            return
        self._running = False
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            try:
                self._watch.show()
            finally:
                self._watch.__exit__()
                os.environ.pop(LIVE, None)
        if ended:
            append(self._folder, "sweep", "ended")

    def _go(self) -> None:
        try:
            self._watch.until_end(self._stop)
        except Exception:
            # A view that fails is no reason for a sweep to fail.
            log.warning("the view of the sweep's progress has failed", exc_info=True)
