"""Safetensors files written tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import json
import math
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from modeling.model_files import FLOATS, WEIGHTS
from settings import ModelError

# Scalars that are looked at together.
_BLOCK = 1 << 20
_CODES = {name: code for code, name in FLOATS.items()}
# What a tokenizer and its chat template, and `generate`, read.
_BESIDES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)
_NEVER = (".bin", ".safetensors", ".pt", ".pth", ".py")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that becomes `out` when the block ends without an error.

    Args:
        out: The folder; must be missing or empty.

    Raises:
        ModelError: It holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{str(out)!r} isn't empty; export to a new folder")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def copy_besides(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template and generation config, but neither weights nor code."""
    for path in (path for pattern in _BESIDES for path in source.glob(pattern)):
        if path.is_file() and path.suffix not in _NEVER:
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensor: Callable[[str], Tensor],
) -> int:
    """Writes a safetensors file: the header first, then one tensor after another.

    Args:
        path: The file; overwritten.
        shapes: {tensor name: shape}, in the order in which they are written.
        dtype: Name of the torch dtype that every tensor is cast to.
        tensor: Gives a tensor by its name, in any float dtype.

    Returns:
        Bytes of tensor data.

    Raises:
        ModelError: A tensor isn't finite in `dtype`.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            yield name, tensor(name)

    return write_stream(path, shapes, dtype, tensors(), exact=True)


def write_stream(
    path: Path,
    bounds: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    exact: bool = False,
) -> int:
    """Writes a safetensors file of tensors whose shapes are known only as they come.

    The header is written last, into room left for it in front of the data; what it doesn't fill
    is padded with spaces, as the format allows.

    Args:
        path: The file; overwritten.
        bounds: {tensor name: the largest shape that it may have}, in their order; a tensor may
            also be left out.
        dtype: Name of the torch dtype that every tensor is cast to.
        tensors: (name, tensor) in any float dtype, consumed one at a time.
        exact: Whether the bounds are the shapes themselves.

    Returns:
        Bytes of tensor data.

    Raises:
        ModelError: A tensor isn't finite in `dtype`.
        ValueError: A tensor is larger than its bound, or unlike it where that is exact.
    """
    kind: torch.dtype = getattr(torch, dtype)
    room = len(_header(bounds, dtype))
    written: dict[str, tuple[int, ...]] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", room) + b" " * room)
        for name, value in tensors:
            written[name] = _checked_shape(name, value, bounds[name], exact)
            _write_data(file, name, value.to(kind), dtype)
            del value  # Or it would be held while the next one is made.
        file.seek(8)
        file.write(_header(written, dtype))
    return sum(math.prod(shape) for shape in written.values()) * kind.itemsize


def _checked_shape(
    name: str, value: Tensor, bound: tuple[int, ...], exact: bool
) -> tuple[int, ...]:
    shape = tuple(value.shape)
    fits = len(shape) == len(bound) and all(n <= most for n, most in zip(shape, bound, strict=True))
    if not fits or (exact and shape != bound):
        raise ValueError(f"{name} is {shape}, not {bound}")
    return shape


def _write_data(file: BinaryIO, name: str, value: Tensor, dtype: str) -> None:
    flat = value.contiguous().flatten()
    if not all(bool(part.isfinite().all()) for part in flat.split(_BLOCK)):
        raise ModelError(
            f"{name} isn't finite in {dtype}; use weights without NaN or infinity, or a wider "
            "model.dtype"
        )
    file.write(flat.view(torch.uint8).numpy().data)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The header of tensors that lie one behind another, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, size = 0, getattr(torch, dtype).itemsize
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        entry = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def write_index(
    folder: Path, shards: Mapping[str, Mapping[str, tuple[int, ...]]], size: int
) -> None:
    """Writes the index that says which shard holds which tensor; a single file needs none.

    Args:
        folder: Where the shards lie.
        shards: {file name: {tensor name: shape}}.
        size: Bytes of tensor data in all shards.
    """
    if list(shards) == [WEIGHTS[0]]:
        return
    parameters = sum(math.prod(shape) for names in shards.values() for shape in names.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / WEIGHTS[1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
