"""`Shape`, a model's parameters and projections from its config.json, and placeholders of weights.

The checks that a run makes before its heavy work read config files and safetensors headers. Both
follow from a config.json, so that a plan makes every one of these checks before any download. The
placeholders are as long as real files and take no room: nothing is written behind the header.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from modeling.model_files import ADAPTER_WEIGHTS, FLOATS, WEIGHTS
from modeling.training import LoraSettings
from settings import ModelError, first_line

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_CODES = {dtype: code for code, dtype in FLOATS.items()}
_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Shape:
    """What a config.json says of a model's size.

    Attributes:
        tensors: {parameter name: shape}, tied ones once, as a checkpoint holds them.
        linears: {module path: (d_out, d_in)} of the matrices in the blocks.
        key_width: Width of all key-value heads together.
    """

    tensors: dict[str, tuple[int, ...]]
    linears: dict[str, tuple[int, int]]
    layers: int
    hidden: int
    key_width: int

    @cached_property
    def parameters(self) -> int:
        """All scalars, tied weights counted once."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def adapted(self, lora: LoraSettings) -> dict[str, tuple[int, int]]:
        """Those of `linears` that a LoRA adapts."""
        linears, targets = self.linears.items(), lora.target_modules
        return {name: shape for name, shape in linears if name.rpartition(".")[2] in targets}

    def lora_parameters(self, lora: LoraSettings) -> int:
        """Scalars of a LoRA: r (d_in + d_out) over all projections."""
        return sum(lora.rank * (d_out + d_in) for d_out, d_in in self.adapted(lora).values())


@cache
def read_shape(folder: str | Path, *, classifier: bool = False) -> Shape:
    """The shape of the model that a folder's config.json describes.

    The architecture, a sequence classifier or a causal language model, is built on torch's meta
    device, which holds no numbers.

    Raises:
        ModelError: transformers doesn't know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the config.json of {str(folder)!r} can't be read ({first_line(error)}); give a model "
            "of an architecture that transformers knows without remote code"
        ) from error
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        tensors={name: tuple(each.shape) for name, each in model.named_parameters()},
        linears={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and _BLOCK.search(f"{name}.")
        },
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        key_width=kv_heads * head_dim,
    )


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
