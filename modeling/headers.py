"""Safetensors headers: what a weights file holds, without reading a single weight."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from modeling.checkpoint import ADAPTER_WEIGHTS, WEIGHTS, Checkpoint, resolve


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
    folder = Path(checkpoint.base)
    if not checkpoint.is_local:
        folder = Path(resolve(checkpoint.base, checkpoint.revision, "model.base")[0])
    single, index = (folder / name for name in WEIGHTS)
    files = [single]
    if index.is_file():
        parts = set(json.loads(index.read_text())["weight_map"].values())
        files = [folder / part for part in sorted(parts)]
    if checkpoint.adapter is not None:
        files.append(Path(checkpoint.adapter) / ADAPTER_WEIGHTS)
    return sum(
        math.prod(entry["shape"]) for path in files for entry in read_header(path)[0].values()
    )
