"""`SweepState`, what is known of a sweep and its jobs from their folders; the views show it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.launch.progress.estimate import time_left
from experiments.results.command_line import override_key
from experiments.results.events import Tail
from experiments.results.status import STATUS, is_alive, is_here, job_folders

ENDED = ("done", "failed", "killed")


@dataclass(slots=True)
class StageState:
    """A stage of a job.

    Attributes:
        status: "waiting", "running", "made" or "reused".
        since: When that began, in seconds since 1970.
    """

    name: str
    key: str
    status: str
    since: float


@dataclass(slots=True)
class JobState:
    """A job of a sweep.

    Attributes:
        number: Its number in the sweep, from 0.
        status: "queued", "running", "done", "failed" or "killed".
        overrides: Its settings, as on a command line.
        start: When it began, in seconds since 1970; None if that isn't known.
        end: When it ended, likewise.
        reason: Why it failed.
        result: What it measured, in a few words.
        stages: Its stages, in the order in which it needed them.
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
    """A sweep's folder, read again by `refresh`.

    Attributes:
        folder: The sweep's folder.
        jobs: The jobs that have a folder, by number.
        total: How many jobs there will be; None if that isn't known.
        varies: The settings that differ among the jobs.
        start: When the sweep began, in seconds since 1970; None if that isn't known.
        ended: Whether it is over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[int, JobState] = {}
        self.total: int | None = None
        self.varies: list[str] = []
        self.start: float | None = None
        self.ended = False
        self.at_once = 1
        self._now: set[int] | None = None
        self._parent: dict[str, Any] | None = None
        self._own = Tail(folder)
        self._tails: dict[int, Tail] = {}
        self._stamps: dict[int, int] = {}

    def refresh(self) -> None:
        """Reads what has been written since the last time."""
        for event in self._own.new():
            if event["event"] == "sweep":
                self._apply(event)
        for folder in job_folders(self.folder):
            number = int(folder.name)
            job = self.jobs.setdefault(number, JobState(number, folder))
            tail = self._tails.setdefault(number, Tail(folder))
            if not self._read_status(job) and job.status in ("done", "failed"):
                continue
            for event in tail.new():
                if not self._is_past(number, event["time"]):
                    _apply(job, event)
        running = self.of("running")
        self.at_once = max(self.at_once, len(running))
        self.ended = self.ended or self._is_abandoned(bool(running))

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

    def _is_abandoned(self, running: bool) -> bool:
        """Whether nobody goes on with it, though its end was never written down."""
        if running:
            return False
        if self._parent is None or _is_gone(self._parent):
            return True
        return self.total is not None and len(self.of(*ENDED)) >= self.total

    def _is_past(self, number: int, when: float | None) -> bool:
        """Whether that was before the sweep that now runs the job, perhaps once more."""
        if self.start is None or when is None or when >= self.start:
            return False
        return self._now is None or number in self._now

    def _apply(self, event: dict[str, Any]) -> None:
        if event["status"] == "ended":
            self.ended = True
            return
        self.ended = False
        for memory in (self.jobs, self._tails, self._stamps):
            memory.clear()
        self.start = event["time"]
        self.total = event["total"]
        self.varies = event["varies"]
        self._now = None if event["numbers"] is None else set(event["numbers"])
        self._parent = event

    def _read_status(self, job: JobState) -> bool:
        """Reads what a job says of itself; returns whether that may be news."""
        path = job.folder / STATUS
        try:
            stamp = path.stat().st_mtime_ns
            if self._stamps.get(job.number) == stamp and job.status != "running":
                return False
            content = json.loads(path.read_text())
            killed = _is_killed(content)
            if killed:  # Or it has ended since it was read.
                content = json.loads(path.read_text())
                killed = _is_killed(content)
        except (OSError, ValueError):
            return True
        self._stamps[job.number] = stamp
        when = content.get("time")
        if self._is_past(job.number, when):
            return True
        job.overrides = content["overrides"]
        job.status = content["status"]
        job.reason = content.get("reason", "")
        if killed:
            job.status = "killed"
        if job.start is None:
            job.start = when if content["status"] == "running" else None
        job.end = when if content["status"] in ENDED else None
        return True


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has written into the folder."""
    if any((job / STATUS).is_file() for job in job_folders(folder)):
        return True
    return any(event["event"] == "sweep" for event in Tail(folder).new())


def _is_gone(process: Mapping[str, Any]) -> bool:
    return is_here(process) and not is_alive(process)


def _is_killed(status: Mapping[str, Any]) -> bool:
    return status["status"] == "running" and _is_gone(status)


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


def varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The settings that aren't the same in all jobs, of which each is a list of overrides."""
    common = set.intersection(*(set(job) for job in jobs)) if jobs else set()
    differing = (each for job in jobs for each in job if each not in common)
    return list(dict.fromkeys(map(override_key, differing)))
