"""`SweepState`, what is known of a sweep and its jobs from their folders; the views show it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.results.command_line import override_key
from experiments.results.events import read
from experiments.results.status import STATUS, is_alive, is_here, job_folders

ENDED = ("done", "failed", "killed")
_RECENT = 5


@dataclass(slots=True)
class StageState:
    """A stage of a job.

    Attributes:
        status: "waiting", "running", "made" or "reused".
        since: When that began, in seconds since 1970.
        place: Which of how many it is, in words; "" where that isn't known.
    """

    name: str
    key: str
    status: str
    since: float
    place: str = ""


@dataclass(slots=True)
class JobState:
    """A job of a sweep.

    Attributes:
        status: "queued", "running", "done", "failed" or "killed".
        start: When it began, in seconds since 1970; None if that isn't known.
        end: When it ended, likewise.
        result: What it measured, in a few words.
    """

    number: int
    folder: Path
    status: str = "queued"
    overrides: list[str] = field(default_factory=list)
    start: float | None = None
    end: float | None = None
    reason: str = ""
    result: str = ""
    stages: list[StageState] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """How long it took, or has been running for."""
        if self.start is None:
            return None
        return max(0.0, (time.time() if self.end is None else self.end) - self.start)

    @property
    def current(self) -> StageState | None:
        """The stage that it makes or waits for."""
        last = self.stages[-1] if self.stages else None
        return last if last is not None and last.status in ("waiting", "running") else None

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """By stage name, how many stages have which status; one that is asked for twice is one.

        A stage in which the job ended is "unfinished".
        """
        first: dict[str, StageState] = {}
        for stage in self.stages:
            first.setdefault(stage.key, stage)
        counts: dict[str, Counter[str]] = {}
        for stage in first.values():
            broken_off = self.status in ENDED and stage is self.current
            status = "unfinished" if broken_off else stage.status
            counts.setdefault(stage.name, Counter())[status] += 1
        return counts


class SweepState:
    """The folder of a sweep, or of a single run as a sweep of one job, read again by `refresh`.

    Attributes:
        total: How many jobs there will be; None if that isn't known.
        start: When the sweep began, in seconds since 1970; None if that isn't known.
        earlier: What it took in all before it was started last, in seconds, if jobs run again.
        at_once: The most jobs that were seen to run side by side.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[int, JobState] = {}
        self.total: int | None = None
        self.varies: list[str] = []
        self.start: float | None = None
        self.earlier = 0.0
        self.ended = False
        self.at_once = 1

    def refresh(self) -> None:
        """Reads what the sweep and its jobs say now; jobs that have ended say no more."""
        if (self.folder / STATUS).is_file():
            self.jobs, self.total = {0: _read_job(self.folder, 0.0)}, 1
            self.start = self.jobs[0].start
            self.ended = self.jobs[0].status in ENDED
            return
        own = [event for event in read(self.folder) if event["event"] == "sweep"]
        started = next((each for each in reversed(own) if each["status"] == "started"), None)
        numbers = None
        if started is not None:
            if started["time"] != self.start:
                self.jobs.clear()
            self.start, self.total = started["time"], started["total"]
            self.varies, numbers = started["varies"], started["numbers"]
            # A killed one left no end.
            self.earlier = sum(
                end["time"] - begin["time"]
                for begin, end in pairwise(own)
                if (begin["status"], end["status"]) == ("started", "ended")
                and end["time"] <= self.start
            )
        for folder in job_folders(self.folder):
            number = int(folder.name)
            if number not in self.jobs or self.jobs[number].status not in ("done", "failed"):
                runs = numbers is None or number in numbers
                self.jobs[number] = _read_job(folder, (self.start or 0.0) if runs else 0.0)
        self.at_once = max(self.at_once, len(self.of("running")))
        self.ended = (bool(own) and own[-1]["status"] == "ended") or self._is_abandoned(started)

    def of(self, *statuses: str) -> list[JobState]:
        """The jobs of these statuses, by number."""
        return [job for _, job in sorted(self.jobs.items()) if job.status in statuses]

    @property
    def queued(self) -> int | None:
        """How many jobs have yet to start; None if that isn't known."""
        if self.total is None:
            return None
        return max(0, self.total - len(self.of(*ENDED, "running")))

    def label(self, job: JobState) -> str:
        """What sets a job apart from the others."""
        varies = self.varies or varying([each.overrides for each in self.jobs.values()])
        shown = [each for each in job.overrides if override_key(each) in varies]
        return " ".join(shown) or f"job {job.number}"

    def counts(self) -> dict[str, Counter[str]]:
        """By stage name, how many stages of all jobs have which status."""
        total: dict[str, Counter[str]] = {}
        for _, job in sorted(self.jobs.items()):
            for name, counts in job.counts.items():
                total.setdefault(name, Counter()).update(counts)
        return total

    def time_left(self) -> float | None:
        """Seconds until the last job ends; None if that can't be said."""
        if self.queued is None:
            return None
        done = sorted(self.of("done"), key=lambda job: job.end or 0.0)
        return time_left(
            [job.seconds for job in done if job.seconds is not None],
            [job.seconds or 0.0 for job in self.of("running")],
            self.queued,
            self.at_once,
        )

    def _is_abandoned(self, started: Mapping[str, Any] | None) -> bool:
        """Whether nobody goes on with it, though its end was never written down."""
        if self.of("running"):
            return False
        if started is None or _is_gone(started):
            return True
        return self.total is not None and len(self.of(*ENDED)) >= self.total


def is_watchable(folder: Path) -> bool:
    """Whether a run or a sweep has written into the folder."""
    if (folder / STATUS).is_file() or any((job / STATUS).is_file() for job in job_folders(folder)):
        return True
    return any(event["event"] == "sweep" for event in read(folder))


def varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The settings that aren't the same in all jobs, of which each is a list of overrides."""
    common = set.intersection(*(set(job) for job in jobs)) if jobs else set()
    differing = (each for job in jobs for each in job if each not in common)
    return list(dict.fromkeys(map(override_key, differing)))


def time_left(
    ended: Sequence[float], running: Sequence[float], queued: int, at_once: int
) -> float | None:
    """Seconds until the last job ends: the mean of the last five jobs for each that is to come.

    The first job doesn't count, since it makes the stages that all share.

    Args:
        ended: What the jobs that ended well took, in seconds, in the order of their ends.
        running: For how many seconds each of those that run has been running.
        queued: How many wait for their turn.
        at_once: How many run side by side.

    Returns:
        None before there is a basis, that is until a second job has ended; 0 if none is to come.
    """
    if not running and not queued:
        return 0.0
    if len(ended) < 2:
        return None
    mean = fmean(ended[1:][-_RECENT:])
    rest = [*(max(0.0, mean - seconds) for seconds in running), *([mean] * queued)]
    return max(sum(rest) / max(1, at_once), *rest)


def _read_job(folder: Path, since: float) -> JobState:
    """A job by its folder; what it said before `since` is of an earlier run of it."""
    job = JobState(int(folder.name) if folder.name.isdecimal() else 0, folder)
    # Before the events: a job that has ended adds no more of them.
    status = _read_status(folder)
    if _is_killed(status):
        status = _read_status(folder)  # Or it has ended since it was read.
    when = status.get("time")
    if status and (when is None or when >= since):
        job.overrides, job.reason = status["overrides"], status.get("reason", "")
        job.status = "killed" if _is_killed(status) else status["status"]
        job.start = when if status["status"] == "running" else None
        job.end = when if status["status"] in ENDED else None
    for event in read(folder):
        if event["time"] >= since:
            _apply(job, event)
    return job


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        status: dict[str, Any] = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return status


def _is_gone(process: Mapping[str, Any]) -> bool:
    return is_here(process) and not is_alive(process)


def _is_killed(status: Mapping[str, Any]) -> bool:
    return status.get("status") == "running" and _is_gone(status)


def _apply(job: JobState, event: Mapping[str, Any]) -> None:
    status, when = event["status"], event["time"]
    if event["event"] == "job":
        if status == "running":  # From the beginning, where a queue starts it once more.
            job.stages, job.start, job.result = [], when, ""
        elif status == "measured":
            job.result = event["result"]
    elif event["event"] == "stage":
        last = job.current
        if last is None or last.key != event["key"]:
            last = StageState(event["name"], event["key"], status, when)
            job.stages.append(last)
        last.status, last.since = status, when
        if event.get("of"):
            last.place = f" ({event['number']} of {max(event['of'], event['number'])})"
