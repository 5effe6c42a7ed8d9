"""Views of a sweep's state: a line per job, a snapshot, and a live drawing for a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from experiments.launch.progress.state import JobState, SweepState

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    yield f"sweep {sweep.folder}"
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

    ended = len(sweep.of("done", "failed", "killed"))
    parts: list[RenderableType] = []
    if sweep.total:
        bar = Table.grid()  # Alone it wouldn't end its line.
        bar.add_row(ProgressBar(total=sweep.total, completed=ended, width=60))
        parts.append(bar)
    parts.append(Text(_job_counts(sweep), style="bold", overflow="ellipsis", no_wrap=True))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True)
    table.add_column(style="cyan", overflow="ellipsis", no_wrap=True)
    running = sweep.of("running")
    room = max(_LEAST_ROWS, height - _OTHER_LINES)
    for job in running[:room]:
        table.add_row(str(job.number), Text(sweep.label(job)), _doing(job))
    if len(running) > room:
        table.add_row("", f"and {len(running) - room} more", "")
    if running:
        parts.append(table)
    stages = _stages(sweep.counts())
    if stages:
        parts.append(Text(f"stages: {stages}", style="dim"))
    parts.append(Text(_times(sweep)))
    return Group(*parts)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for unit, length, most in (("s", 1, 99.5), ("min", 60, 5970), ("h", 3600, 172800)):
        if seconds < most:
            value = seconds / length
            return f"{value:.1f} {unit}" if unit == "h" and value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _time_left(sweep: SweepState) -> str:
    """An estimate in words; "" where there is none."""
    seconds = sweep.time_left()
    if seconds is None:
        return ""
    # The first job made what the others share.
    about = "about" if len(sweep.of("done")) > 1 else "up to about"
    return f"{about} {duration(max(1, round(seconds))).replace('.0', '')} left"


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
        return f"ended after {duration(max(ends) - start)}"
    estimate = _time_left(sweep) or "time left is not known yet"
    running = "" if start is None else f"running for {duration(time.time() - start)}, "
    return f"{running}{estimate}"


def _doing(job: JobState) -> str:
    stage = job.current
    if stage is None:
        last = job.stages[-1].name if job.stages else None
        return "reading data" if last is None else f"after {last}"
    doing = "waits for" if stage.status == "waiting" else "makes"
    return f"{doing} {stage.name}, {duration(time.time() - stage.since)}"


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
