"""How long the rest of a sweep will take.

A job costs its own seconds (reading, statistics) and those of the stages that it has to make. A
stage is made once for all jobs that agree in the settings which it depends on; which those are is
learnt from the keys that finished jobs had: two jobs with the same key agree in all that the stage
depends on, and two jobs that differ in one setting and in the key show that it depends on that
one. What is still unknown of this makes the estimate a range.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

Slot = tuple[str, int]
"""A place in a job's order of stages: the stage's name, and how many of this name came before."""

_RECENT = 5


@dataclass(frozen=True, slots=True)
class Taken:
    """What a job took in one slot.

    Attributes:
        key: The stage's key.
        seconds: How long making it takes, or once took.
        made: Whether this job made it.
    """

    key: str
    seconds: float
    made: bool


@dataclass(frozen=True, slots=True)
class Course:
    """How a job went, or is going.

    Attributes:
        settings: What the job has of the settings that vary in the sweep; None if unknown.
        taken: Its stages so far.
        seconds: How long it took, or had been running for when it began what it does now.
        waited: The part of that in which another process made its stages.
        current: Seconds spent on what it does now; 0 for a finished job.
    """

    settings: Mapping[str, str] | None
    taken: Mapping[Slot, Taken] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    current: float = 0.0

    @property
    def own(self) -> float:
        """Seconds in which it neither made a stage nor waited for one."""
        made = sum(taken.seconds for taken in self.taken.values() if taken.made)
        return max(0.0, self.seconds - made - self.waited)


@dataclass(frozen=True, slots=True)
class Left:
    """Seconds until the last job ends, at least and at most, as far as jobs can tell."""

    low: float
    high: float


def time_left(
    finished: Sequence[Course],
    running: Sequence[Course],
    queued: Sequence[Mapping[str, str] | None],
    at_once: int,
) -> Left | None:
    """Estimates when the last job ends.

    Args:
        finished: The jobs that ended well, in the order in which they ended.
        running: Those that run now.
        queued: The settings of those that wait for their turn, as in `Course`.
        at_once: How many run side by side.

    Returns:
        None before there is a basis: until a job has ended. 0 if none is left.
    """
    if not running and not queued:
        return Left(0.0, 0.0)
    if not finished:
        return None
    jobs = [*finished, *running]
    if any(job.settings is None for job in jobs) or None in queued:
        expected = _by_recent_jobs(finished, running, len(queued))
        high = _together(*expected, at_once)
        return Left(high if len(finished) > 1 else 0.0, high)
    known = [settings for settings in queued if settings is not None]
    low, high = (
        _together(*_by_stages(finished, running, known, cautious), at_once)
        for cautious in (False, True)
    )
    return Left(min(low, high), high)


def _together(running: Sequence[float], queued: Sequence[float], at_once: int) -> float:
    """Seconds that jobs of these lengths take, so many at once."""
    work = sum(running) + sum(queued)
    return max([work / max(1, at_once), *running, *queued])


def _by_recent_jobs(
    finished: Sequence[Course], running: Sequence[Course], queued: int
) -> tuple[list[float], list[float]]:
    mean = fmean(job.seconds for job in _recent(finished))
    rest = [max(0.0, mean - job.seconds - job.current) for job in running]
    return rest, [mean] * queued


def _recent(finished: Sequence[Course]) -> Sequence[Course]:
    """The last few jobs; the first, which makes what all share, only for want of others."""
    return finished[1:][-_RECENT:] or finished


def _by_stages(
    finished: Sequence[Course],
    running: Sequence[Course],
    queued: Sequence[Mapping[str, str]],
    cautious: bool,
) -> tuple[list[float], list[float]]:
    """Seconds left of every running job, and of every one in the queue.

    Args:
        finished: As in `time_left`.
        running: As in `time_left`.
        queued: As in `time_left`.
        cautious: Whether stages depend on all that they may depend on, and none of those that
            are to come is in the store already.
    """
    jobs = [*finished, *running]
    dimensions = sorted({name for job in jobs for name in job.settings or ()})
    slots = sorted({slot for job in finished for slot in job.taken})
    # A first job's own seconds are for the most part imports, which the next may find done.
    own = fmean(job.own for job in _recent(finished)) if cautious or len(finished) > 1 else 0.0
    rest = [max(0.0, own - job.own) for job in running]
    to_come = [own] * len(queued)
    for slot in slots:
        seen = [(job.settings or {}, job.taken[slot].key) for job in jobs if slot in job.taken]
        if cautious:
            depends = dimensions_left(seen, dimensions)
        else:
            depends = dimensions_proved(seen, dimensions)
        cost = _cost([job.taken[slot] for job in jobs if slot in job.taken], cautious)
        there = {_project(settings, depends) for settings, _ in seen}
        for index, job in enumerate(running):
            place = _project(job.settings or {}, depends)
            if slot not in job.taken and place not in there:
                there.add(place)
                rest[index] += cost
        for index, settings in enumerate(queued):
            place = _project(settings, depends)
            if place not in there:
                there.add(place)
                to_come[index] += cost
    return [max(0.0, left - job.current) for left, job in zip(rest, running, strict=True)], to_come


Seen = Sequence[tuple[Mapping[str, str], str]]


def dimensions_left(seen: Seen, dimensions: Sequence[str]) -> list[str]:
    """The settings that a stage may depend on: jobs that share a key agree in all of them.

    Args:
        seen: Settings and key of every job that took the stage.
        dimensions: The settings that vary.
    """
    by_key: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for settings, key in seen:
        by_key[key].append(settings)
    return [
        name
        for name in dimensions
        if all(len({each.get(name) for each in alike}) == 1 for alike in by_key.values())
    ]


def dimensions_proved(seen: Seen, dimensions: Sequence[str]) -> list[str]:
    """The settings that a stage does depend on: jobs that differ in one alone have other keys."""
    proved = []
    for name in dimensions:
        others = [each for each in dimensions if each != name]
        keys: dict[tuple[str | None, ...], set[str]] = defaultdict(set)
        for settings, key in seen:
            keys[_project(settings, others)].add(key)
        if any(len(each) > 1 for each in keys.values()):
            proved.append(name)
    return proved


def _project(settings: Mapping[str, str], names: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(settings.get(name) for name in names)


def _cost(taken: Sequence[Taken], cautious: bool) -> float:
    """Mean seconds of a stage; those that were in the store before the sweep cost nothing."""
    spent: dict[str, float] = {}
    for each in taken:
        free = not each.made and not cautious
        spent[each.key] = max(spent.get(each.key, 0.0), 0.0 if free else each.seconds)
    return fmean(spent.values())
