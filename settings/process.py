"""Processes: a child that ends with its parent, and imports that aren't slowed by collections."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from multiprocessing import parent_process
from threading import Thread

_usual: tuple[int, int, int] | None = None


def begin_child(wait: Callable[[], object] | None = None) -> None:
    """What a child process does first: it collects rarely, and ends as soon as its parent does.

    However that ends: a child whose parent was killed would go on, and then wait for good.

    Args:
        wait: Returns when the parent has ended; None for a process of `multiprocessing`, whose
            parent is known, and in any other nothing is waited for.
    """
    collect_rarely()
    parent = parent_process()
    if wait is None and parent is not None:
        wait = parent.join
    if wait is not None:
        Thread(target=_end_after, args=(wait,), daemon=True).start()


def _end_after(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)


def collect_rarely() -> None:
    """Lets garbage lie until `collect_as_usual`: while the large libraries are imported.

    torch, transformers, PEFT and TRL make half a million objects that stay; a fifth of the time
    of importing them is looking through these again and again.
    """
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(100_000, 20, 50)


def collect_as_usual() -> None:
    """Leaves what there is, most of it made by imports, out of every later collection."""
    global _usual
    gc.freeze()
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None
