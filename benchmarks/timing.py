"""The cost of one call, for the benchmarks that put two ways of computing side by side."""

from __future__ import annotations

from collections.abc import Callable

from modeling.measure import Measurement, measured


def cost_of(work: Callable[[], object]) -> Measurement:
    """Seconds and peak memory of a second call; a first one starts up threads and libraries."""
    work()
    with measured() as cost:
        work()
    return cost
