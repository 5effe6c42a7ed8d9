"""Model folders that appear complete or not at all, their weights written tensor by tensor.

What stays as it is, tensors and whole files, is copied without being looked at; memory holds some
rows of what is computed.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import gt
from pathlib import Path

import torch
from torch import Tensor

from modeling.model_files import FLOATS, WEIGHTS, StoredTensor, stored_tensors
from modeling.stored import BLOCK, behind, copy_bytes, copy_file, read_rows
from settings import ModelError

Shapes = Mapping[str, tuple[int, ...]]
# A tensor in a file, copied as it is or cast; one in memory; or rows as they are computed.
Content = StoredTensor | Tensor | Iterator[Tensor]

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
    path: Path, bounds: Shapes, dtype: str, tensors: Iterable[tuple[str, Content]]
) -> None:
    """Writes a safetensors file of tensors whose shapes are known only as they come.

    The header is written last, into room left for it in front of the data; what it doesn't fill
    is padded with spaces, as the format allows.  A thread writes while the next rows are computed.

    Args:
        path: The file; overwritten.
        bounds: {tensor name: the largest shape that it may have}, in their order; a tensor may
            also be left out.
        dtype: Name of the torch dtype that every tensor is cast to.
        tensors: (name, content), consumed one at a time; rows fill the largest shape.

    Raises:
        ModelError: What is computed or cast isn't finite in `dtype`; copies aren't looked at.
        ValueError: A tensor is larger than its bound, or its rows don't fill it.
    """
    kind, room = getattr(torch, dtype), len(_header(bounds, dtype))
    written: dict[str, tuple[int, ...]] = {}
    with path.open("wb") as file, behind() as write:
        write(file.write, struct.pack("<Q", room) + b" " * room)
        for name, value in tensors:
            bound = bounds[name]
            shape = bound if isinstance(value, Iterator) else tuple(value.shape)
            if len(shape) != len(bound) or any(map(gt, shape, bound)):
                raise ValueError(f"{name} is {shape}, not {bound}")
            written[name], size = shape, math.prod(shape)
            if isinstance(value, StoredTensor) and FLOATS[value.code] == dtype:
                write(copy_bytes, value.path, file, value.start, size * kind.itemsize)
                continue
            for rows in _rows(value):
                flat = rows.to("cpu", kind).contiguous().flatten()
                # An infinity or a NaN is the least or the largest of the numbers.
                if len(flat) and not all(each.isfinite() for each in flat.aminmax()):
                    raise ModelError(
                        f"{name} isn't finite in {dtype}; use weights without NaN or infinity, or "
                        "a wider model.dtype"
                    )
                write(file.write, flat.view(torch.uint8).numpy().data)
                size -= len(flat)
            if size:
                raise ValueError(f"{name} isn't filled by its rows")
        write(file.seek, 8)
        write(file.write, _header(written, dtype))


def _rows(value: Content) -> Iterable[Tensor]:
    if isinstance(value, StoredTensor):
        return (rows for _, rows in read_rows(value))
    return value.detach().flatten().split(BLOCK) if isinstance(value, Tensor) else value


def write_shards(
    source: Path,
    out: Path,
    shards: Mapping[str, Shapes],
    dtype: str,
    computed: Mapping[str, Callable[[], Content]],
) -> None:
    """Writes weights files, and the index of several.

    What isn't `computed` is what `source` holds under the same name, cast to `dtype`; a file that
    is to hold what one of `source` does is copied whole (`copy_file`).

    Args:
        source: A folder of full weights.
        out: Where the new files go.
        shards: {file name: {tensor name: shape}}.
        dtype: Name of the torch dtype of all tensors.
        computed: {tensor name: gives its content}, each called when its turn comes.

    Raises:
        ModelError: What is computed or cast isn't finite in `dtype`.
    """
    stored = stored_tensors(source)
    files: dict[Path, set[str]] = {}
    for name, tensor in stored.items():
        files.setdefault(tensor.path, set()).add(name)

    def is_kept(name: str) -> bool:
        return name not in computed and FLOATS.get(stored[name].code) == dtype

    for file, shapes in shards.items():
        same = next((path for path, names in files.items() if names == shapes.keys()), None)
        if same is not None and all(map(is_kept, shapes)):
            copy_file(same, out / file)
            continue
        contents = ((key, computed[key]() if key in computed else stored[key]) for key in shapes)
        write_tensors(out / file, shapes, dtype, contents)
    write_index(out, shards, dtype)


def write_index(folder: Path, shards: Mapping[str, Shapes], dtype: str) -> None:
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


def _header(shapes: Shapes, dtype: str) -> bytes:
    """The header of tensors that lie one behind another, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    code = next(code for code, name in FLOATS.items() if name == dtype)
    end, size = 0, getattr(torch, dtype).itemsize
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
