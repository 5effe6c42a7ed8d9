"""How a job runs on its machine: processes, threads, and GPUs leased from a list by file locks."""

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
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from settings import SettingError, Settings
from settings.memory import say_streaming

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger("relock")

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 1.0

# What this process holds, by GPU. The system drops the locks when it ends, however it ends.
_held: dict[str, FileLock] = {}


class Runtime(Settings):
    """The `runtime` section.

    Attributes:
        isolate: Whether every stage runs in a child process.
        gpus: The GPUs that jobs share, as indices or UUIDs; each leases its own of them. None: a
            job sees what CUDA_VISIBLE_DEVICES shows.
        gpus_per_job: How many a job leases.
        threads: Threads of torch in a job; None: as OMP_NUM_THREADS says, or the launcher.
        stream_weights: Whether a defense reads the weights of a model block by block, as they
            run, where forward passes are all that it needs; the results are the same. None: those
            of a model that doesn't fit into free memory.
        progress: How a run shows how far it is: a live view on a terminal and lines elsewhere,
            lines, or nothing.
    """

    isolate: bool = False
    gpus: tuple[int | str, ...] | None = None
    gpus_per_job: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    stream_weights: bool | None = None
    progress: Literal["auto", "plain", "off"] = "auto"

    @field_validator("progress", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return "off" if value is False else value  # A YAML file's off.

    @model_validator(mode="after")
    def _check_gpus(self) -> Runtime:
        if self.gpus is None:
            return self
        names = [str(gpu) for gpu in self.gpus]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"runtime.gpus names {', '.join(twice)} twice; name each GPU once")
        if any(not name or "/" in name or name.startswith("-") for name in names):
            raise ValueError("runtime.gpus should hold indices or UUIDs, such as [0,1]")
        if self.gpus_per_job > len(names):
            raise ValueError(
                f"runtime.gpus_per_job={self.gpus_per_job} is more than the {len(names)} of "
                "runtime.gpus; lower it, or list more"
            )
        return self

    def prepare(self, threads: int | None) -> None:
        """Takes what the job needs of the machine, before torch is imported.

        `threads` counts where the section says nothing.

        Raises:
            SettingError: The GPUs can't be had.
        """
        say_streaming(self.stream_weights)
        threads = self.threads or threads
        if threads is not None:
            # joblib sets what it finds unset of these, and torch's MKL goes by its own first.
            os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        if self.gpus is not None:
            lease(self.gpus, self.gpus_per_job)


def lease(gpus: Sequence[int | str], per_job: int) -> list[str]:
    """Takes `per_job` GPUs of a list for the life of this process, and hides all others from it.

    Processes of one user on one machine that lease from the same list never share a GPU; while
    too few are free, this waits. A process that holds a lease keeps it. GPUs are indices or UUIDs,
    as CUDA_VISIBLE_DEVICES has them.

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
