"""Views of a sweep's state: a line per job, a snapshot, a live drawing, and who keeps them up."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.launch.progress.console import LIVE, is_live
from experiments.launch.progress.state import ENDED, JobState, SweepState
from experiments.results.events import append
from settings.progress import duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

log = logging.getLogger("relock")

_EVERY_SECONDS = 0.5
_STATUSES = ("made", "reused", "running", "waiting", "unfinished")
_OTHER_LINES = 8
_LEAST_ROWS = 3


def ended_line(sweep: SweepState, job: JobState, nth: int) -> str:
    """What became of a job, and what it measured."""
    of = "" if sweep.total is None else f"/{sweep.total}"
    took = "" if job.seconds is None else f" in {duration(job.seconds)}"
    result = f"; {job.result}" if job.result else ""
    ends = {"done": f"done{took}{result}", "failed": f"failed{took.replace(' in ', ' after ')}"}
    return f"[{nth}{of}] {sweep.label(job)}: {ends.get(job.status, job.status)}"


def whole_line(sweep: SweepState, job: JobState, nth: int) -> str:
    """`ended_line` with the stages that the job made and reused, and the sweep's time left."""
    going_on = sweep.queued or sweep.of("running")
    estimate = _time_left(sweep) if going_on else ""
    return "; ".join(filter(None, (ended_line(sweep, job, nth), _stages(job.counts), estimate)))


def snapshot(sweep: SweepState) -> Iterator[str]:
    """The whole state as plain lines."""
    yield str(sweep.folder)
    yield _job_counts(sweep)
    for job in sweep.of("running"):
        yield f"running: {sweep.label(job)}: {_doing(job)}"
    for job in sweep.of("failed", "killed"):
        yield f"{job.status}: {sweep.label(job)}" + (f": {job.reason}" if job.reason else "")
    stages = _stages(sweep.counts())
    if stages:
        yield f"stages: {stages}"
    yield _times(sweep)


def drawing(sweep: SweepState, height: int) -> RenderableType:
    """The state as a view of at most `height` lines."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    if sweep.total:
        bar = Table.grid()  # Alone it wouldn't end its line.
        bar.add_row(ProgressBar(total=sweep.total, completed=len(sweep.of(*ENDED)), width=60))
        parts.append(bar)
    running = [f"{job.number:4}  {sweep.label(job)}: {_doing(job)}" for job in sweep.of("running")]
    room = max(_LEAST_ROWS, height - _OTHER_LINES)
    if len(running) > room:
        running[room:] = [f"      and {len(running) - room} more"]
    stages = _stages(sweep.counts())
    lines = [_job_counts(sweep), *running, stages and f"stages: {stages}", _times(sweep)]
    parts += [Text(line, overflow="ellipsis", no_wrap=True) for line in lines if line]
    return Group(*parts)


def _time_left(sweep: SweepState) -> str:
    """An estimate in words; "" where there is none."""
    seconds = sweep.time_left()
    if seconds is None:
        return ""
    return f"about {duration(max(1, round(seconds))).replace('.0', '')} left"


def _job_counts(sweep: SweepState) -> str:
    counts = {name: len(sweep.of(name)) for name in ("done", "failed", "killed", "running")}
    parts = [f"{counts['done']} done", f"{counts['failed']} failed"]
    parts += [f"{counts['killed']} killed"] if counts["killed"] else []
    parts += [f"{counts['running']} running"]
    if sweep.queued is not None:
        word = "not started" if sweep.ended else "queued"
        parts.append(f"{sweep.queued} {word}")
    total = len(sweep.jobs) if sweep.total is None else sweep.total
    return f"{total} jobs: {', '.join(parts)}"


def _times(sweep: SweepState) -> str:
    begun = [job.start for job in sweep.jobs.values() if job.start is not None]
    start = min(begun, default=None) if sweep.start is None else sweep.start
    if sweep.ended:
        # Jobs that don't run again had ended before.
        ends = [job.end for job in sweep.jobs.values() if job.end and job.end >= (start or 0.0)]
        if start is None or not ends:
            return "ended"
        took = max(ends) - start
        last = f", {duration(took)} of it when jobs ran again" if sweep.earlier else ""
        return f"ended after {duration(sweep.earlier + took)}{last}"
    estimate = _time_left(sweep) or "time left is not known yet"
    running = "" if start is None else f"running for {duration(time.time() - start)}, "
    return f"{running}{estimate}"


def _doing(job: JobState) -> str:
    stage = job.current
    if stage is None:
        last = job.stages[-1].name if job.stages else None
        return "reading data" if last is None else f"after {last}"
    doing = "waits for" if stage.status == "waiting" else "makes"
    return f"{doing} {stage.name}{stage.place}, {duration(time.time() - stage.since)}"


def _stages(counts: dict[str, Counter[str]]) -> str:
    """By name, how many stages were made, reused, are running or waited for."""
    parts = []
    for name, of_name in counts.items():
        counted = [
            status if of_name.total() == 1 else f"{of_name[status]} {status}"
            for status in _STATUSES
            if of_name[status]
        ]
        parts.append(f"{name} {' + '.join(counted)}")
    return ", ".join(parts)


class Watch:
    """Shows how far a sweep is."""

    def __init__(self, folder: Path, live: bool) -> None:
        self.sweep = SweepState(folder)
        self._shown: set[int] = set()
        self._live: Live | None = None
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), auto_refresh=False, transient=True)

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
        if self._live is not None:
            self._live.update(drawing(self.sweep, self._live.console.height), refresh=True)
        return not self.sweep.ended

    def until_end(self, stop: threading.Event) -> None:
        """Shows the state again and again, until the sweep has ended or `stop` is set."""
        while self.show() and not stop.wait(_EVERY_SECONDS):
            pass

    def _say(self, job: JobState) -> None:
        reason = f"error: {job.reason}" if job.status == "failed" else ""
        if self._live is None:
            print(whole_line(self.sweep, job, len(self._shown)), flush=True)
            if reason:
                print(reason, file=sys.stderr, flush=True)
            return
        from rich.text import Text

        line = ended_line(self.sweep, job, len(self._shown))
        style = "" if job.status == "done" else "red"
        for text in filter(None, (line, reason)):
            # A style of `print` would be the view's, too.
            self._live.console.print(Text(text, style=style), soft_wrap=True)


class View:
    """The view of a sweep that runs in this process."""

    def __init__(self, folder: Path, progress: str, jobs: dict[str, Any]) -> None:
        """Begins to watch; `jobs` is what is known of them: total, varies, numbers."""
        folder.mkdir(parents=True, exist_ok=True)
        here = {"host": socket.gethostname(), "pid": os.getpid()}
        append(folder, "sweep", "started", **here, **jobs)
        self._folder = folder
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
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
        """Says what is left to say, and leaves the terminal as it was."""
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
