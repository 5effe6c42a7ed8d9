"""Batches of rows on this process's device, for what transformers runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from settings import ModelError

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_batches(
    rows: Sequence[_In],
    ids: Sequence[Sequence[int]],
    batch_size: int,
    what: str,
    read: Callable[[list[_In]], list[_Out]],
) -> list[_Out]:
    """What `read` makes of the rows, in their order, batch by batch.

    Longest first, so that running out of memory shows in the first batch.

    Args:
        rows: What is read.
        ids: Token ids of each, for their length.
        batch_size: Rows per batch.
        what: Name of what is made, for the progress bar.
        read: Makes one result of each row of a batch.
    """
    from tqdm import tqdm

    order = sorted(range(len(rows)), key=lambda index: -len(ids[index]))
    results: dict[int, _Out] = {}
    with tqdm(total=len(order), desc=what, disable=None, leave=False) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            results.update(zip(batch, read([rows[index] for index in batch]), strict=True))
            bar.update(len(batch))
    return [results[index] for index in range(len(rows))]


@contextmanager
def inference(batch_size: int) -> Iterator[None]:
    """Computes without gradients, and names the setting to lower where memory runs out.

    Raises:
        ModelError: The device ran out of memory.
    """
    import torch

    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device ran out of memory with {batch_size} rows at once; lower the batch_size of "
            "the transformers backend (evaluation.backend.transformers.batch_size)"
        ) from error


def free_memory() -> None:
    """Gives back what no object holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
