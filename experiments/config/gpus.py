"""Which GPUs a job sees: leased from a list by file locks, before anything imports torch."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from settings import SettingError

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger("relock")

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 1.0

# What this process holds, by GPU. The system drops the locks when it ends, however it ends.
_held: dict[str, FileLock] = {}


def lease(gpus: Sequence[int | str], per_job: int) -> list[str]:
    """Takes `per_job` GPUs of a list for the life of this process, and hides all others from it.

    Processes of one user on one machine that lease from the same list never share a GPU; while
    too few are free, this waits. A process that holds a lease keeps it.

    Args:
        gpus: Indices or UUIDs, as CUDA_VISIBLE_DEVICES has them.
        per_job: How many this job gets.

    Returns:
        The GPUs that are this process's own now, in the list's order.

    Raises:
        SettingError: The list names a GPU that CUDA_VISIBLE_DEVICES hides, or torch opened one
            already.
    """
    names = [str(gpu) for gpu in gpus]
    mine = [name for name in names if name in _held]
    if len(mine) < per_job:
        _check_visible(names)
        _check_unopened()
        mine += _wait([name for name in names if name not in _held], per_job - len(mine))
    mine = [name for name in names if name in mine][:per_job]
    os.environ[VISIBLE] = ",".join(mine)
    log.info("GPU %s: this job's own", ", ".join(mine))
    return mine


def _check_visible(names: Sequence[str]) -> None:
    # submitit's local executor sets it to "" where no GPU was asked of it, whatever it was before.
    if _held or os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return
    variable = os.environ.get(VISIBLE)
    if variable is None:
        return
    visible = [name.strip() for name in variable.split(",") if name.strip()]
    hidden = [name for name in names if name not in visible]
    if hidden:
        raise SettingError(
            f"runtime.gpus names {', '.join(hidden)}, which {VISIBLE}={variable} hides; list GPUs "
            "as that variable names them, or unset it"
        )


def _check_unopened() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise SettingError(
            "runtime.gpus comes too late, since this process uses a GPU already; run the job in a "
            f"process of its own, or set {VISIBLE} instead"
        )


def _wait(names: Sequence[str], count: int) -> list[str]:
    is_logged = False
    while not (locked := _take(names, count)):
        if not is_logged:
            log.info("waiting for %d of the GPUs %s to be free", count, ", ".join(names))
            is_logged = True
        time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))
    return locked


def _take(names: Sequence[str], count: int) -> list[str]:
    """Locks so many GPUs, or none where too few are free."""
    from filelock import FileLock, Timeout

    folder = _folder()
    locks: dict[str, FileLock] = {}
    # One job chooses at a time: two that need two GPUs each must not take one each and wait.
    with FileLock(folder / "choosing.lock"):
        for name in names:
            lock = FileLock(folder / f"{name}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                locks[name] = lock
            if len(locks) == count:
                _held.update(locks)
                return list(locks)
        for lock in locks.values():
            lock.release()
    return []


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"relock-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
