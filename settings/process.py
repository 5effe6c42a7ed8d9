"""A child process that ends with its parent: a stage's, a sweep job's, a vLLM worker's."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import parent_process
from threading import Thread


def end_with_parent(wait: Callable[[], object] | None = None) -> None:
    """Ends this process as soon as the one that started it ends, however that ends.

    Without it, a child whose parent was killed would go on, and then wait for good.

    Args:
        wait: Returns when the parent has ended; None for a process of `multiprocessing`, whose
            parent is known, and in any other nothing is done.
    """
    parent = parent_process()
    if wait is None and parent is not None:
        wait = parent.join
    if wait is not None:
        Thread(target=_end_after, args=(wait,), daemon=True).start()


def _end_after(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)
