"""Files of a model or adapter folder: which hold weights, what their headers say, whether whole.

Read by whatever resolves, checks, edits or serves a model on disk; no weight is read here.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import ModelError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# torch's names of the dtypes that a safetensors header codes, of weights that aren't quantised.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file, known from the header alone.

    Its data begin at the byte `start` of the file; `code` is its dtype there, e.g. "BF16".
    """

    path: Path
    start: int
    code: str
    shape: tuple[int, ...]


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a local PEFT adapter folder."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def verify_folder(folder: str | Path, setting: str) -> None:
    """Checks that a local model or adapter folder is complete before anything is loaded.

    Reads only headers: each safetensors file must be as long as its own header says.

    Raises:
        ModelError: The folder, its config or its weights are missing or cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{setting}={str(folder)!r} is not a folder; give a model folder")
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        raise ModelError(f"{setting}={str(folder)!r} has no config.json; give a model folder")
    names = [ADAPTER_WEIGHTS] if is_adapter(folder) else weight_files(folder, setting)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"{setting}={str(folder)!r} holds no weights ({name} is missing); "
                "save or download the model again"
            )
        if not _is_whole(path):
            raise ModelError(
                f"{setting}: {str(path)!r} is truncated or damaged; save or download it again"
            )


def weight_files(folder: Path, setting: str = "model.base") -> list[str]:
    """Names of the safetensors files of a full model: one, or the shards of its index.

    Raises:
        ModelError: There is neither.
    """
    index = folder / WEIGHTS[1]
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if not (folder / WEIGHTS[0]).is_file():
        raise ModelError(
            f"{setting}={str(folder)!r} holds no weights ({WEIGHTS[0]} is missing); "
            "save or download the model again, as safetensors"
        )
    return [WEIGHTS[0]]


def read_header(path: str | Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file and the byte at which its data begin.

    Returns:
        {tensor name: {"dtype", "shape", "data_offsets"}} with offsets counted from the second
        value, without the free-form `__metadata__`.

    Raises:
        ValueError: The file ends before its header does, or this is no header.
    """
    with Path(path).open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= Path(path).stat().st_size - 8:
            raise ValueError(f"{str(path)!r} is cut short")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def stored_tensors(folder: Path, setting: str = "model.base") -> dict[str, StoredTensor]:
    """Every tensor of a full model's files by its name, file by file in each one's order."""
    tensors: dict[str, StoredTensor] = {}
    for path in (folder / name for name in weight_files(folder, setting)):
        header, start = read_header(path)
        for name, entry in header.items():
            begin = start + entry["data_offsets"][0]
            tensors[name] = StoredTensor(path, begin, entry["dtype"], tuple(entry["shape"]))
    return tensors


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        header, start = read_header(path)
    except ValueError:
        return False
    ends = (entry["data_offsets"][1] for entry in header.values())
    return start + max(ends, default=0) == path.stat().st_size
