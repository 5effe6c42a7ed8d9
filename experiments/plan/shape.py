"""The shape of a model, from its config.json: parameters, projections, heads; no weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from settings import ModelError, first_line

_BLOCK = re.compile(r"\.\d+\.")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What a config.json says of a model's size.

    Attributes:
        tensors: {parameter name: shape}, tied ones once, as a checkpoint holds them.
        linears: {module path: (d_out, d_in)} of the matrices in the blocks.
        layers: Blocks.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        intermediate: Width of the MLP.
        vocabulary: Rows of the embedding.
    """

    tensors: dict[str, tuple[int, ...]]
    linears: dict[str, tuple[int, int]]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @cached_property
    def parameters(self) -> int:
        """All scalars, tied weights counted once."""
        return sum(_product(shape) for shape in self.tensors.values())

    @cached_property
    def multiplied(self) -> int:
        """Scalars that a token is multiplied with: the blocks' matrices and the head."""
        inside = sum(d_out * d_in for d_out, d_in in self.linears.values())
        return inside + self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def largest(self) -> int:
        """Scalars of the largest matrix in the blocks."""
        return max(d_out * d_in for d_out, d_in in self.linears.values())

    def lora(self, rank: int, targets: Sequence[str]) -> Lora:
        """The size of a LoRA on the projections of these names."""
        chosen = {
            name: shape
            for name, shape in self.linears.items()
            if name.rpartition(".")[2] in targets
        }
        return Lora(rank, sum(rank * (d_out + d_in) for d_out, d_in in chosen.values()), chosen)


@dataclass(frozen=True)
class Lora:
    """A LoRA's size.

    Attributes:
        rank: r.
        parameters: r (d_in + d_out) over all projections.
        modules: {module path: (d_out, d_in)}.
    """

    rank: int
    parameters: int
    modules: dict[str, tuple[int, int]]


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
    return Shape(
        tensors={name: tuple(each.shape) for name, each in model.named_parameters()},
        linears={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and _BLOCK.search(f"{name}.")
        },
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
