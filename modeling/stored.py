"""Tensors in safetensors files: read by rows ahead of use, copied by the kernel, or linked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modeling.model_files import FLOATS, StoredTensor
from settings import ModelError

# Scalars of a block of rows: 1 MiB in float32, which stays in a core's own cache.
BLOCK = 1 << 18
# Bytes that the kernel copies at a time, so that a copy can be interrupted.
_CHUNK = 1 << 28

_links: ContextVar[bool] = ContextVar("links", default=False)


def row_blocks(shape: Sequence[int]) -> list[slice]:
    """The blocks of rows in which a tensor of this shape is read, the same ones each time."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [slice(at, min(at + step, shape[0])) for at in range(0, max(1, shape[0]), step)]


def read_rows(stored: StoredTensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, tensor[rows]) in the file's dtype; while one is used the next is read.

    They are read, not mapped: a mapped file keeps all that was read of it in memory.
    """
    dtype: torch.dtype = getattr(torch, FLOATS[stored.code])
    shape = stored.shape or (1,)
    width, parts = math.prod(shape[1:]), row_blocks(shape)
    with stored.path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as ahead:

        def read(part: slice) -> Tensor:
            block = torch.empty(part.stop - part.start, *shape[1:], dtype=dtype)
            _fill(block, stored.path, file, stored.start + part.start * width * dtype.itemsize)
            return block

        coming = ahead.submit(read, parts[0])
        for part, following in zip_longest(parts, parts[1:]):
            block = coming.result()
            if following is not None:
                coming = ahead.submit(read, following)
            yield part, block


def read_tensor(stored: StoredTensor) -> Tensor:
    """The whole tensor in the file's dtype."""
    whole = torch.empty(stored.shape, dtype=getattr(torch, FLOATS[stored.code]))
    with stored.path.open("rb", buffering=0) as file:
        _fill(whole, stored.path, file, stored.start)
    return whole


def _fill(tensor: Tensor, path: Path, file: FileIO, start: int) -> None:
    into = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(start)
    while len(into):
        if not (done := file.readinto(into)):
            raise _cut_short(path)
        into = into[done:]


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """A function that makes calls in a thread, in order, each while its caller is at the next."""
    last: list[Future[Any]] = []

    def call(work: Callable[..., Any], *arguments: Any) -> None:
        if last:
            last.pop().result()
        last.append(thread.submit(work, *arguments))

    with ThreadPoolExecutor(1) as thread:
        yield call
        if last:
            last.pop().result()


@contextmanager
def linking() -> Iterator[None]:
    """Lets `copy_file` make hard links: the new file of weights is the old one under two names."""
    token = _links.set(True)
    try:
        yield
    finally:
        _links.reset(token)


def is_linking() -> bool:
    """Whether `linking` is in force."""
    return _links.get()


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copies a file as `copy_bytes` does; weights are linked where `linking`, if that can be done.

    That is on one file system alone.
    """
    source, target = Path(source).resolve(), Path(target)  # A hub's snapshot links to its files.
    if is_linking() and target.suffix == ".safetensors":
        with suppress(OSError):
            target.hardlink_to(source)
            return
    with target.open("wb") as file:
        copy_bytes(source, file, 0, source.stat().st_size)


def copy_bytes(source: Path, target: BinaryIO, start: int, count: int) -> None:
    """Appends bytes of a file to one open for writing, within the kernel where it can.

    File systems that share blocks between files (btrfs, XFS) then copy nothing.
    """
    target.flush()
    with source.open("rb", buffering=0) as file:
        while count:
            size = min(count, _CHUNK)
            try:
                done = os.copy_file_range(file.fileno(), target.fileno(), size, start)
            except (AttributeError, OSError):  # Not this system, or not between these files.
                done = 0
            done = done or os.write(target.fileno(), os.pread(file.fileno(), size, start))
            if not done:
                raise _cut_short(source)
            start, count = start + done, count - done


def _cut_short(path: Path) -> ModelError:
    return ModelError(f"{str(path)!r} is truncated or damaged; save or download it again")
