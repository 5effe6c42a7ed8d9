"""Safetensors headers: what a weights file holds, without reading a single weight."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling.checkpoint import ADAPTER_WEIGHTS, Checkpoint, local_folder, weight_files
from settings import SettingError


def read_header(path: str | Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file and the byte at which its data begin.

    Args:
        path: A safetensors file that `verify_folder` has found complete.

    Returns:
        {tensor name: {"dtype", "shape", "data_offsets"}} with offsets counted from the second
        value, without the free-form `__metadata__`.
    """
    with Path(path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def count_parameters(checkpoint: Checkpoint) -> int:
    """How many scalars a checkpoint stores, its adapter's included; tied weights count once.

    Raises:
        ModelError: The base weights can't be found.
    """
    files = _weight_paths(checkpoint)
    if checkpoint.adapter is not None:
        files.append(Path(checkpoint.adapter) / ADAPTER_WEIGHTS)
    return sum(
        math.prod(entry["shape"]) for path in files for entry in read_header(path)[0].values()
    )


def projection_names(checkpoint: Checkpoint) -> list[str]:
    """Last names of the matrices in a model's blocks, sorted, e.g. ["down_proj", "gate_proj"].

    Raises:
        ModelError: The base weights can't be found.
    """
    found = {
        key.split(".")[-2]
        for path in _weight_paths(checkpoint)
        for key, entry in read_header(path)[0].items()
        if len(entry["shape"]) == 2 and re.search(r"\.\d+\..*\.weight$", key)
    }
    return sorted(found)


def check_target_modules(names: Sequence[str], checkpoint: Checkpoint, setting: str) -> None:
    """Refuses names of projections that the model doesn't have; PEFT would ignore them.

    Raises:
        SettingError: One sentence that lists the model's own.
    """
    known = projection_names(checkpoint)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SettingError(
            f"{setting}: {unknown[0] if unknown else 'an empty list'} is no projection of "
            f"{checkpoint.base!r}; choose from {', '.join(known)}"
        )


def _weight_paths(checkpoint: Checkpoint) -> list[Path]:
    folder = local_folder(checkpoint)
    return [folder / name for name in weight_files(folder, "model.base")]
