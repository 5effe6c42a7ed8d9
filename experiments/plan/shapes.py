"""`Shape`, a model's parameters and projections from its config.json: no weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modeling.training import LoraSettings
from settings import ModelError, first_line

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Shape:
    """What a config.json says of a model's size.

    Attributes:
        tensors: {parameter name: shape}, tied ones once, as a checkpoint holds them.
        linears: {module path: (d_out, d_in)} of the matrices in the blocks.
        layers: Blocks.
        hidden: Width of the residual stream.
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
        targets = lora.target_modules
        return {
            name: shape
            for name, shape in self.linears.items()
            if name.rpartition(".")[2] in targets
        }

    def lora_parameters(self, lora: LoraSettings) -> int:
        """Scalars of a LoRA: r (d_in + d_out) over all projections."""
        return sum(lora.rank * (d_out + d_in) for d_out, d_in in self.adapted(lora).values())


def read_shape(folder: str | Path, *, classifier: bool = False) -> Shape:
    """The shape of the model that a folder's config.json describes.

    The architecture is built on torch's meta device, which holds no numbers.

    Args:
        folder: Holds the config.json.
        classifier: Whether it is a sequence classifier rather than a causal language model.

    Raises:
        ModelError: transformers doesn't know the architecture.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

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
