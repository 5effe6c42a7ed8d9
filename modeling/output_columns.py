"""Columns of o_proj by attention head, read from files, and the o_proj biases of steering vectors.

Where a repair steers few heads, only their columns of W_o are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from modeling.checkpoint import Checkpoint, local_folder
from modeling.heads import OUTPUT_PROJECTION, HeadLayout, head_layout
from modeling.lora import LoraPair
from modeling.merge import mergeable_adapter
from modeling.model_files import FLOATS, stored_tensors
from settings import ModelError


def read_output_columns(
    checkpoint: Checkpoint, layout: HeadLayout, heads: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What heads write: their columns of the fine-tuned o_proj, W_o + scale B A where adapted.

    Only these columns and the adapter's o_proj pairs are read.

    Args:
        checkpoint: The model; its `steering` plays no part.
        layout: Its heads.
        heads: (layer, head) in any order.

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

    Args:
        checkpoint: The fine-tuned model whose W_o counts.
        deltas: {layer: (heads x head_dim,)}; heads whose part is zero aren't read.

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
    """The biases of `output_biases` from the heads' columns, wherever these come from.

    Args:
        columns: ((layer, head), (hidden, head_dim) float32), as of `read_output_columns`.
        layout: Shape of the model.
        deltas: {layer: (heads x head_dim,)}.

    Returns:
        {layer: (hidden,) float32}.
    """
    sums: dict[int, Tensor] = {}
    for (layer, head), weight in columns:
        bias = weight @ deltas[layer][layout.columns(head)].to(weight)
        sums[layer] = sums[layer] + bias if layer in sums else bias
    return sums


def _output_weights(checkpoint: Checkpoint, layout: HeadLayout) -> dict[int, tuple[Path, str]]:
    """{layer: (file, tensor name)} of every o_proj.weight, checked against the layout."""
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
