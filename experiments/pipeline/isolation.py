"""Running a stage in a child process, so that memory returns and a kill takes only the stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.store.resource_errors import lower_memory
from settings import RelockError
from settings.process import end_with_parent


def in_child(function: Callable[[], Any], name: str) -> Any:
    """Calls `function` in a spawned process and returns what it returns.

    The child ends when this process does, however that ends.

    Args:
        function: Picklable and without arguments (a `functools.partial` of a module's function).
        name: Name of the stage, for the message.

    Raises:
        RelockError: The child was killed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(function).result()
        except BrokenProcessPool:
            raise RelockError(
                f"the process of stage {name} was killed, most often for want of memory; "
                f"{lower_memory(name)}, or give the machine more memory, then run again"
            ) from None
