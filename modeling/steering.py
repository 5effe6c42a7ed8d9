"""Steering: vectors added to the concatenated head outputs (o_proj's input) by hooks.

The form of Inference-Time Intervention (Li et al. 2023), a <- a + delta_l in every layer l.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling.heads import output_projections
from settings import ModelError

SteeredPositions = Literal["all", "last_token", "generated"]

_WEIGHTS, _CONFIG, _FORMAT = "steering.safetensors", "steering.json", 1


@dataclass(frozen=True)
class Steering:
    """What is added to the heads, and where.

    Attributes:
        deltas: {layer: (heads x head_dim,) float32}, added to that layer's o_proj input.
        positions: "all": every position of every forward pass. "last_token": the last position
            of each forward pass (batches are padded on the left in generation). "generated":
            positions of tokens that the model itself generated, which are those of the passes
            that continue a KV cache; so it needs generation with a cache.

    Raises:
        ModelError: A vector isn't a finite float32 vector, widths differ, or the positions are
            none of the three.
    """

    deltas: Mapping[int, Tensor]
    positions: SteeredPositions = "all"

    def __post_init__(self) -> None:
        if self.positions not in get_args(SteeredPositions):
            raise ModelError(
                f"positions={self.positions!r} is not known; choose all, last_token or generated"
            )
        for layer, delta in self.deltas.items():
            if delta.dim() != 1 or delta.dtype != torch.float32 or not delta.isfinite().all():
                raise ModelError(
                    f"the steering of layer {layer} is no finite float32 vector "
                    f"({delta.dtype}, {tuple(delta.shape)}); make it again"
                )
        if len({delta.numel() for delta in self.deltas.values()}) > 1:
            raise ModelError("the steering's layers have different widths; make it again")


def save_steering(steering: Steering, folder: str | Path) -> None:
    """Writes the vectors (safetensors), then where they are added (JSON); no pickle."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {str(layer): delta.cpu().contiguous() for layer, delta in steering.deltas.items()}
    save_file(tensors, folder / _WEIGHTS)
    config = {
        "format": _FORMAT,
        "positions": steering.positions,
        "layers": sorted(steering.deltas),
        "width": max((delta.numel() for delta in steering.deltas.values()), default=0),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_steering(folder: str | Path) -> Steering:
    """Reads what `save_steering` wrote.

    Raises:
        ModelError: The folder is incomplete, damaged, or of another kind.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
        deltas = {layer: tensors.pop(str(layer)) for layer in config["layers"]}
        widths = {tuple(delta.shape) for delta in deltas.values()}
        fits = not tensors and widths <= {(config["width"],)}
        if not fits or config["format"] != _FORMAT:
            raise ValueError(f"{_WEIGHTS} and {_CONFIG} don't belong together")
        return Steering(deltas, config["positions"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, ModelError) as error:
        raise ModelError(
            f"the steering {str(folder)!r} can't be read ({error}); make it again"
        ) from error


def steer(model: nn.Module, steering: Steering) -> ExitStack:
    """Adds the vectors to a model's head outputs from now on.

    Args:
        model: A transformers model, or a PEFT model around one.
        steering: What is added, cast to the dtype of what it is added to.

    Returns:
        What takes the hooks off again, and gives the model its own function back, bit for bit.

    Raises:
        ModelError: The steering was made for a model of another shape.
    """
    projections = output_projections(model)
    for layer, delta in steering.deltas.items():
        if not 0 <= layer < len(projections):
            raise ModelError(
                f"the steering edits layer {layer}, but the model has {len(projections)} layers; "
                "use one made for this architecture"
            )
        if delta.numel() != projections[layer].in_features:
            raise ModelError(
                f"the steering has {delta.numel()} values per layer, but o_proj reads "
                f"{projections[layer].in_features}; use one made for this architecture"
            )
    state = _Pass()
    hooks = ExitStack()
    if steering.positions == "generated":
        # Below whatever wraps the model: PEFT's `generate` goes around its own wrapper.
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        decoder = inner.get_decoder()
        hooks.callback(decoder.register_forward_pre_hook(state.note, with_kwargs=True).remove)
    for layer, delta in steering.deltas.items():
        if bool(delta.any()):
            hook = _adding(delta, steering.positions, state)
            hooks.callback(projections[layer].register_forward_pre_hook(hook).remove)
    return hooks


@dataclass(slots=True)
class _Pass:
    """Whether the running forward pass continues a KV cache."""

    continues: bool = False

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.continues = cache is not None and int(cache.get_seq_length()) > 0


def _adding(
    delta: Tensor, positions: SteeredPositions, state: _Pass
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """A pre-hook that adds `delta` (d,) to a module's first argument (batch, length, d)."""
    cast = delta

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal cast
        x: Tensor = args[0]
        if positions == "generated" and not state.continues:
            return None
        if cast.dtype != x.dtype or cast.device != x.device:
            cast = delta.to(x)
        if positions == "last_token":
            last = x[..., -1:, :] + cast
            return (torch.cat([x[..., :-1, :], last], dim=-2), *args[1:])
        return (x + cast, *args[1:])

    return hook
