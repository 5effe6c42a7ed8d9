"""Attention heads: how many there are, and where each one's output lies in its layer's o_proj."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling.architectures import LLAMA_LIKE
from modeling.checkpoint import Checkpoint
from settings import ModelError, first_line

OUTPUT_PROJECTION = re.compile(r"(^|\.)layers\.(?P<layer>\d+)\.self_attn\.o_proj$")


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """The attention heads of a model.

    Attributes:
        model_type: transformers' name of the architecture, e.g. "llama".
        layers: Number of decoder layers.
        heads: Query heads per layer; their outputs are concatenated into o_proj's input.
        kv_heads: Key-value heads per layer; fewer than `heads` with grouped-query attention.
        head_dim: Width of one head's output; need not be hidden / heads.
        hidden: Width of the residual stream, which is o_proj's output.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @property
    def width(self) -> int:
        """Width of o_proj's input: heads x head_dim."""
        return self.heads * self.head_dim

    def columns(self, head: int) -> slice:
        """Where a head's output lies in o_proj's input.

        Raises:
            IndexError: There is no such head.
        """
        if not 0 <= head < self.heads:
            raise IndexError(f"head {head} of {self.heads}")
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def read_config(checkpoint: Checkpoint) -> Any:
    """The base model's transformers config, from its config.json alone.

    Raises:
        ModelError: There is none, or transformers doesn't know the architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.base, revision=checkpoint.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the config.json of {checkpoint.base!r} can't be read ({first_line(error)}); give a "
            "model of an architecture that transformers knows without remote code"
        ) from error


def head_layout(checkpoint: Checkpoint) -> HeadLayout:
    """The heads of a model, from its config.json alone.

    The architecture is built without memory for its weights, and o_proj's own input width gives
    head_dim: a config may leave it out, or state one that isn't hidden / heads (Mistral-Nemo).

    Raises:
        ModelError: The model has no attention heads that end in an o_proj in every layer.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(checkpoint)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"{checkpoint.base!r} is no causal language model ({first_line(error)}); "
            f"choose {LLAMA_LIKE}"
        ) from error
    projections = output_projections(model)
    heads = getattr(config, "num_attention_heads", None)
    shapes = {(module.in_features, module.out_features) for module in projections}
    if not isinstance(heads, int) or len(shapes) != 1 or next(iter(shapes))[0] % heads:
        raise _no_heads(config.model_type)
    width, hidden = next(iter(shapes))
    return HeadLayout(
        model_type=config.model_type,
        layers=len(projections),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=width // heads,
        hidden=hidden,
    )


def output_projections(model: nn.Module) -> list[Any]:
    """Every layer's self_attn.o_proj in layer order; where PEFT wraps it, the wrapper itself.

    Raises:
        ModelError: There is a layer without one, or none at all.
    """
    config: Any = model.config
    projections: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if (match := OUTPUT_PROJECTION.search(name)) is not None:
            layer = int(match["layer"])
            if layer in projections:
                raise _no_heads(config.model_type)
            projections[layer] = module
    layers = getattr(config, "num_hidden_layers", None)
    if not projections or sorted(projections) != list(range(layers or 0)):
        raise _no_heads(config.model_type)
    return [projections[layer] for layer in range(len(projections))]


def _no_heads(model_type: str) -> ModelError:
    return ModelError(
        f"a model of type {model_type!r} has no self_attn.o_proj with attention heads in every "
        f"layer; choose {LLAMA_LIKE}"
    )
