"""Placeholders for weights that aren't here: headers without a single number behind them.

The checks that a run makes before its heavy work read config files and safetensors headers. Both
follow from a config.json, so that a plan makes every one of these checks before any download. The
files are as long as real ones and take no room: nothing is written behind the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from experiments.plan.shapes import BYTES, Shape
from modeling.model_files import ADAPTER_WEIGHTS, WEIGHTS
from modeling.training import LoraSettings

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_model(source: Path, shape: Shape, dtype: str, out: Path) -> None:
    """Writes `out` as a model folder of this shape: the source's own files and a header."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in WEIGHTS:
            (out / path.name).symlink_to(path.resolve())
    _write_header(out / WEIGHTS[0], shape.tensors, dtype)


def write_adapter(shape: Shape, lora: LoraSettings, base: str, out: Path) -> None:
    """Writes `out` as the folder of a LoRA on a model of this shape."""
    out.mkdir(parents=True)
    config = lora.config()
    config.base_model_name_or_path = base
    config.save_pretrained(out)
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (d_out, d_in) in shape.adapted(lora).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (lora.rank, d_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (d_out, lora.rank)
    _write_header(out / ADAPTER_WEIGHTS, tensors, "float32")


def _write_header(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
