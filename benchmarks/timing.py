"""The cost of one call, for the benchmarks that put two ways of computing side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from modeling.measure import Measurement, measured

_Result = TypeVar("_Result")


def cost_of(work: Callable[[], object]) -> Measurement:
    """Seconds and peak memory of a second call; a first one starts up threads and libraries."""
    work()
    with measured() as cost:
        work()
    return cost


def in_new_process(work: Callable[[], _Result]) -> _Result:
    """What `work`, which can be pickled, returns in a process that has done nothing before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work).result()
