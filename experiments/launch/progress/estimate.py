"""Time left of a sweep, from how long its last jobs took; the sweep's state asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

_RECENT = 5


def time_left(
    ended: Sequence[float], running: Sequence[float], queued: int, at_once: int
) -> float | None:
    """Seconds until the last job ends: the mean of the last five jobs for each that is to come.

    The first job, which makes the stages that all share, counts only for want of others.

    Args:
        ended: What the jobs that ended well took, in seconds, in the order of their ends.
        running: For how many seconds each of those that run has been running.
        queued: How many wait for their turn.
        at_once: How many run side by side.

    Returns:
        None before there is a basis, that is until a job has ended; 0 if none is to come.
    """
    if not running and not queued:
        return 0.0
    if not ended:
        return None
    mean = fmean(ended[1:][-_RECENT:] or ended)
    rest = [*(max(0.0, mean - seconds) for seconds in running), *([mean] * queued)]
    return max(sum(rest) / max(1, at_once), *rest)
