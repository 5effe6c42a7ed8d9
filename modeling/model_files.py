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
CONFIG = "config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_JSON = (CONFIG, ADAPTER_CONFIG, "tokenizer_config.json", "generation_config.json")
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

    Reads configs and headers: each safetensors file must be as long as its own header says.

    Raises:
        ModelError: The folder, its config or its weights are missing, damaged or cut short, or it
            is both a full model and an adapter.
    """
    folder = Path(folder)
    called = f"{setting}={str(folder)!r}"
    if not folder.is_dir():
        raise ModelError(f"{called} is not a folder; give a model folder")
    if not is_adapter(folder) and not (folder / CONFIG).is_file():
        inside = [each for each in sorted(folder.iterdir()) if _is_model(each)]
        hint = f", such as {str(inside[0])!r}" if inside else ""
        raise ModelError(f"{called} has no config.json; give a model folder{hint}")
    if is_adapter(folder) and any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{called} holds full weights and {ADAPTER_CONFIG}, so that transformers would put an "
            "adapter on them that may be merged already; move the files of one of the two away"
        )
    for name in _JSON:
        if (folder / name).is_file():
            read_json(folder / name, setting)
    names = [ADAPTER_WEIGHTS] if is_adapter(folder) else weight_files(folder, setting)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"{called} holds no weights ({name} is missing); save or download the model again"
            )
        if not _is_whole(path):
            raise ModelError(
                f"{setting}: {str(path)!r} is truncated or damaged; save or download it again"
            )


def weight_files(folder: Path, setting: str = "model.base") -> list[str]:
    """Names of the safetensors files of a full model: one, or the shards of its index.

    Where a folder was saved both ways transformers reads the single file, and so does all else.

    Raises:
        ModelError: There is neither, or the index is damaged.
    """
    if (folder / WEIGHTS[0]).is_file():
        return [WEIGHTS[0]]
    index = folder / WEIGHTS[1]
    if not index.is_file():
        raise ModelError(
            f"{setting}={str(folder)!r} holds no weights ({WEIGHTS[0]} is missing); "
            "save or download the model again, as safetensors"
        )
    places = read_json(index, setting).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{setting}: {str(index)!r} names no weights; save or download it again")
    return sorted(set(places.values()))


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A config or an index.

    Raises:
        ModelError: It isn't a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{setting}: {str(path)!r} is no JSON; save or download it again")
    return content


def stamp(*folders: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file of some folders."""
    files = (file for folder in folders for file in sorted(Path(folder).iterdir()))
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


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


def _is_model(path: Path) -> bool:
    return is_adapter(path) or (path / CONFIG).is_file()


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        header, start = read_header(path)
    except ValueError:
        return False
    ends = (entry["data_offsets"][1] for entry in header.values())
    return start + max(ends, default=0) == path.stat().st_size
