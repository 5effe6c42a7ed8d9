"""Model folders that appear complete or not at all, their weights written tensor by tensor.

Memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import gt
from pathlib import Path

import torch
from torch import Tensor

from modeling.model_files import FLOATS, WEIGHTS
from settings import ModelError

# Scalars that are looked at together.
_BLOCK = 1 << 20
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

    Raises:
        ModelError: `out` holds something.
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


def write_tensors(
    path: Path,
    bounds: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes a safetensors file of tensors whose shapes are known only as they come.

    The header is written last, into room left for it in front of the data; what it doesn't fill
    is padded with spaces, as the format allows.

    Args:
        path: The file; overwritten.
        bounds: {tensor name: the largest shape that it may have}, in their order; a tensor may
            also be left out.
        dtype: Name of the torch dtype that every tensor is cast to.
        tensors: (name, tensor) in any float dtype, consumed one at a time.

    Raises:
        ModelError: A tensor isn't finite in `dtype`.
        ValueError: A tensor is larger than its bound.
    """
    room = len(_header(bounds, dtype))
    written: dict[str, tuple[int, ...]] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", room) + b" " * room)
        for name, value in tensors:
            shape, bound = tuple(value.shape), bounds[name]
            if len(shape) != len(bound) or any(map(gt, shape, bound)):
                raise ValueError(f"{name} is {shape}, not {bound}")
            written[name] = shape
            flat = value.to(getattr(torch, dtype)).contiguous().flatten()
            if not all(bool(part.isfinite().all()) for part in flat.split(_BLOCK)):
                raise ModelError(
                    f"{name} isn't finite in {dtype}; use weights without NaN or infinity, or a "
                    "wider model.dtype"
                )
            file.write(flat.view(torch.uint8).numpy().data)
            del value, flat  # Or they would be held while the next one is made.
        file.seek(8)
        file.write(_header(written, dtype))


def write_index(
    folder: Path, shards: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: str
) -> None:
    """Writes the index that says which shard holds which tensor; a single file needs none.

    Args:
        folder: Where the shards lie.
        shards: {file name: {tensor name: shape}}.
        dtype: Name of the torch dtype of all tensors.
    """
    if list(shards) == [WEIGHTS[0]]:
        return
    parameters = sum(math.prod(shape) for names in shards.values() for shape in names.values())
    size = parameters * getattr(torch, dtype).itemsize
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / WEIGHTS[1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The header of tensors that lie one behind another, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    code = next(code for code, name in FLOATS.items() if name == dtype)
    end, size = 0, getattr(torch, dtype).itemsize
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
