"""Safetensors files written tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import WEIGHTS
from settings import ModelError

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    kind: torch.dtype = getattr(torch, dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        entry = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            value = tensor(name).to(kind)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {shape}")
            if not bool(value.isfinite().all()):
                raise ModelError(
                    f"{name} isn't finite in {dtype}; use weights without NaN or infinity, or a "
                    "wider model.dtype"
                )
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return end


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
