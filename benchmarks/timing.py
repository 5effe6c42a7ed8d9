"""A process of its own for what is measured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

_Result = TypeVar("_Result")


def in_new_process(work: Callable[[], _Result]) -> _Result:
    """What `work`, which can be pickled, returns in a process that has done nothing before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work).result()
