"""The cost of one call, for the benchmarks that put two ways of computing side by side."""

from __future__ import annotations

from collections.abc import Callable

from modeling.measure import Cost, measured


def cost_of(work: Callable[[], object]) -> Cost:
    """Seconds and peak memory of a second call; a first one starts up threads and libraries."""
    work()
    with measured() as cost:
        work()
    return cost
