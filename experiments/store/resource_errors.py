"""Want of disk or memory, whichever library met it first, and what to do about it.

Libraries raise it as they please: an `OSError`, an error of Rust or C++ that only its words tell,
or a class of torch's, which isn't imported for that.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from settings import RelockError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_WORDS = re.compile(
    r"no space left on device|disk quota exceeded|file too large|\(os error (28|122|27)\)", re.I
)
_MEMORY_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory: you tried|"
    r"CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc|\(os error 12\)",
    re.I,
)
_MEMORY_CLASSES = ("OutOfMemoryError", "ArrowMemoryError")

_BATCH = (
    "evaluation.backend.transformers.batch_size (evaluation.backend.batch_size with "
    "backend@evaluation.backend=transformers)"
)
_METHOD = "defense.batch_size, where the method has one"
_LOWER = {
    "answer": _BATCH,
    "align": "align.sft.micro_batch_size and align.preference.train.micro_batch_size",
    "attack": "attack.train.micro_batch_size (refine.train.micro_batch_size for refine)",
    "prepare": _METHOD,
    "apply": _METHOD,
    "generate": _BATCH,
    "likelihood": _BATCH,
    "judge": _BATCH,
}
_TRAINED = ("align", "attack")


def is_of_disk(error: BaseException) -> bool:
    """Whether a disk, a quota or the size that a file may have is at its end."""
    return any(_names_disk(each) for each in _chain(error))


def is_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the accelerator's memory is at its end."""
    return any(_names_memory(each) for each in _chain(error))


def disks(error: BaseException, folder: Path) -> str:
    """The folder on whose disk there is no room, or those that it may be, with what is free."""
    named = [Path(e.filename) for e in _chain(error) if isinstance(e, OSError) and e.filename]
    free: dict[int, str] = {}
    for path in map(_existing, named[:1] or [folder, Path(tempfile.gettempdir())]):
        left = shutil.disk_usage(path).free / 1e6
        free.setdefault(path.stat().st_dev, f"{str(path)!r} ({left:,.0f} MB free now)")
    return " or ".join(free.values())


def lower_memory(stage: str) -> str:
    """What to set so that a stage needs less memory."""
    advice = [f"lower {_LOWER[stage]}"] if stage in _LOWER else []
    if stage in _TRAINED:
        advice.append("set model.gradient_checkpointing=true")
    advice.append("set model.dtype=bfloat16 if it is float32")
    return ", or ".join(advice)


@contextmanager
def named(stage: str, root: Path) -> Iterator[None]:
    """Words a shortage that a stage runs into.

    Raises:
        RelockError: A disk is full, or memory at its end.
    """
    try:
        yield
    except RelockError:
        raise
    except Exception as error:
        if is_of_disk(error):
            raise RelockError(
                f"stage {stage}: the disk of {disks(error, root)} is full; free some space "
                "(python -m experiments.store prune --older-than 7d), or set store.root, or TMPDIR "
                "for temporary files, to another disk"
            ) from error
        if is_of_memory(error):
            raise RelockError(f"memory gave out in stage {stage}; {lower_memory(stage)}") from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _names_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK
    return _DISK_WORDS.search(str(error)) is not None


def _names_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ in _MEMORY_CLASSES:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MEMORY_WORDS.search(str(error)) is not None


def _existing(path: Path) -> Path:
    """The nearest folder of the path that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
