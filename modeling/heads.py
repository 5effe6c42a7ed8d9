"""Attention heads: how many there are, and where each one's output lies in its layer's o_proj."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modeling.architectures import LLAMA_LIKE
from modeling.checkpoint import Checkpoint, local_folder
from modeling.inspection import read_config, require_own_names
from modeling.lora import LoraPair, mergeable_adapter
from modeling.model_files import FLOATS, stored_tensors
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
        """Where a head's output lies in o_proj's input; an IndexError where there is none."""
        if not 0 <= head < self.heads:
            raise IndexError(f"head {head} of {self.heads}")
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


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


def read_output_columns(
    checkpoint: Checkpoint, layout: HeadLayout, heads: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What heads write: their columns of the fine-tuned o_proj, W_o + scale B A where adapted.

    Only these columns and the adapter's o_proj pairs are read; `steering` plays no part.

    Yields:
        ((layer, head), (hidden, head_dim) float32), in the order of `heads`.

    Raises:
        ModelError: A head is outside the model, or the weights are not plain floats.
    """
    for layer, head in heads:
        if not (0 <= layer < layout.layers and 0 <= head < layout.heads):
            raise ModelError(
                f"head {head} of layer {layer} is not in {checkpoint.base!r}, which has "
                f"{layout.layers} layers of {layout.heads} heads; use heads of this model"
            )
    places = _output_weights(checkpoint, layout)
    pairs = _output_pairs(checkpoint, {layer for layer, _ in heads})
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for layer, head in heads:
            path, name = places[layer]
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            columns = layout.columns(head)
            weight = files[path].get_slice(name)[:, columns].float()
            if (pair := pairs.get(layer)) is not None:
                weight = weight + pair.scale * (pair.b.float() @ pair.a[:, columns].float())
            yield (layer, head), weight


def output_biases(checkpoint: Checkpoint, deltas: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """b_l = W_o delta_l: the o_proj bias that equals adding delta_l to o_proj's input everywhere.

    The deltas are {layer: (heads x head_dim,)}; heads whose part is zero aren't read.

    Returns:
        {layer: (hidden,) float32}, without layers whose delta is zero.

    Raises:
        ModelError: A delta has another width than this model's o_proj.
    """
    layout = head_layout(checkpoint)
    for layer, delta in deltas.items():
        if tuple(delta.shape) != (layout.width,):
            raise ModelError(
                f"the steering of layer {layer} has shape {tuple(delta.shape)}, but o_proj of "
                f"{checkpoint.base!r} reads {layout.width} values; use one made for this model"
            )
    heads = [
        (layer, head)
        for layer, delta in sorted(deltas.items())
        for head in range(layout.heads)
        if bool(delta[layout.columns(head)].any())
    ]
    return sum_biases(read_output_columns(checkpoint, layout, heads), layout, deltas)


def sum_biases(
    columns: Iterable[tuple[tuple[int, int], Tensor]],
    layout: HeadLayout,
    deltas: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """The biases of `output_biases` from columns as of `read_output_columns`."""
    sums: dict[int, Tensor] = {}
    for (layer, head), weight in columns:
        bias = weight @ deltas[layer][layout.columns(head)].to(weight)
        sums[layer] = sums[layer] + bias if layer in sums else bias
    return sums


def _output_weights(checkpoint: Checkpoint, layout: HeadLayout) -> dict[int, tuple[Path, str]]:
    """{layer: (file, tensor name)} of every o_proj.weight, checked against the layout."""
    require_own_names(checkpoint)
    places = {}
    for key, tensor in stored_tensors(local_folder(checkpoint)).items():
        match = OUTPUT_PROJECTION.search(key.removesuffix(".weight"))
        if match is None or not key.endswith(".weight"):
            continue
        if tensor.code not in FLOATS or tensor.shape != (layout.hidden, layout.width):
            raise ModelError(
                f"{key} of {checkpoint.base!r} is {tensor.code} {list(tensor.shape)}, not a "
                f"float matrix ({layout.hidden}, {layout.width}); use weights that are not "
                "quantised"
            )
        places[int(match["layer"])] = tensor.path, key
    missing = next((layer for layer in range(layout.layers) if layer not in places), None)
    if missing is not None:
        raise ModelError(
            f"{checkpoint.base!r} holds no o_proj.weight of layer {missing}; save or download the "
            "model again"
        )
    return places


def _output_pairs(checkpoint: Checkpoint, layers: set[int]) -> dict[int, LoraPair]:
    adapter = mergeable_adapter(checkpoint, "model.adapter")
    if adapter is None:
        return {}
    matches = {name: OUTPUT_PROJECTION.search(name) for name in adapter.names}
    wanted = {
        name: int(match["layer"])
        for name, match in matches.items()
        if match is not None and int(match["layer"]) in layers
    }
    return {wanted[name]: pair for name, pair in adapter.pairs(wanted)}
