"""Which layers carry safety (paper: safety-critical layers, after arXiv 2408.17003)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling.capture import TokenRow, batches, run_decoder
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name, load_decoder
from modeling.streaming import is_passed
from settings import SettingError

_BLOCK = re.compile(r"^(?P<block>(?:[^.\d]+\.)*(?P<layer>\d+))\.")


def layer_of(name: str) -> int:
    """The decoder block that a projection lies in, e.g. 3 of "model.layers.3.mlp.up_proj"."""
    return int(_matched(name)["layer"])


def by_layer(shapes: Mapping[str, tuple[int, int]]) -> dict[int, list[str]]:
    """Names of projections by layer, layers in order."""
    layers: dict[int, list[str]] = {}
    for name in shapes:
        layers.setdefault(layer_of(name), []).append(name)
    return dict(sorted(layers.items()))


@torch.no_grad()
def hidden_states(
    checkpoint: Checkpoint, names: Sequence[str], rows: Sequence[TokenRow], batch_size: int
) -> Tensor:
    """h_l(x): the last prompt token's hidden state behind every block.

    Blocks are hooked, since the last of a model's `hidden_states` is behind its final norm.

    Returns:
        (layers, rows, hidden) float32 on the CPU.
    """
    model: Any = load_decoder(checkpoint)
    base = model.get_base_model() if checkpoint.adapter is not None else model
    states: list[list[Tensor]] = []
    last = torch.empty(0)

    def keep(at: int) -> Any:
        def hook(block: Any, _: Any, output: Any) -> None:
            if is_passed(block):
                return
            hidden = output[0] if isinstance(output, tuple) else output
            rows_of_batch = torch.arange(len(last), device=hidden.device)
            states[at].append(hidden[rows_of_batch, last].float().cpu())

        return hook

    blocks = dict.fromkeys(_matched(name)["block"] for name in names)
    for at, block in enumerate(sorted(blocks, key=lambda block: layer_of(f"{block}."))):
        states.append([])
        base.get_submodule(block).register_forward_hook(keep(at))
    prompts: list[TokenRow] = [(prompt, []) for prompt, _ in rows]
    data = batches(prompts, batch_size, device_name())

    def start(at: int) -> None:
        nonlocal last
        last = data[at].attention_mask.sum(1) - 1

    run_decoder(base.base_model, data, start)
    return torch.stack([torch.cat(of_block) for of_block in states])


def safety_gap(benign: Tensor, harmful: Tensor, pairs: int, seed: int) -> list[float]:
    """g_l = mean cos(benign, benign') - mean cos(benign, harmful) over seeded pairs, per layer.

    Both are (layers, rows, hidden) of `hidden_states`, benign at least two rows.  Pairs of each
    kind are drawn anew each, so that any number can be had.
    """
    draw = random.Random(seed)
    same = [draw.sample(range(benign.shape[1]), 2) for _ in range(pairs)]
    first, second = (torch.tensor(side) for side in zip(*same, strict=True))
    one = torch.tensor([draw.randrange(benign.shape[1]) for _ in range(pairs)])
    other = torch.tensor([draw.randrange(harmful.shape[1]) for _ in range(pairs)])
    cosine = torch.nn.functional.cosine_similarity
    alike = cosine(benign[:, first].double(), benign[:, second].double(), dim=-1).mean(1)
    unlike = cosine(benign[:, one].double(), harmful[:, other].double(), dim=-1).mean(1)
    return (alike - unlike).tolist()


def window_size(window: int | float, depth: int) -> int:
    """How many layers a window holds: a number, or a share of the depth; at least 2.

    The gap can't rise within a window of one layer.
    """
    size = window if isinstance(window, int) else round(window * depth)
    return min(max(size, 2), depth)


def safety_layers(gaps: Sequence[float], size: int) -> list[int]:
    """The contiguous window in which the gap rises most: argmax of g_end - g_start."""
    starts = range(len(gaps) - size + 1)
    start = max(starts, key=lambda at: gaps[at + size - 1] - gaps[at])
    return list(range(start, start + size))


def named_layers(layers: Sequence[int] | Sequence[float], depth: int) -> list[int]:
    """The layers that `defense.layers` names: as they are, or from a fraction to a fraction.

    Raises:
        SettingError: A layer isn't there, or none lies between the fractions.
    """
    if all(isinstance(layer, int) for layer in layers):
        numbers = sorted(int(layer) for layer in layers)
        if numbers[-1] >= depth:
            raise SettingError(
                f"defense.layers={list(layers)}: the model has layers 0 to {depth - 1} only; "
                "leave out the others, or give two fractions of the depth"
            )
        return numbers
    start, end = (round(fraction * depth) for fraction in layers)
    if start >= end:
        raise SettingError(
            f"defense.layers={list(layers)}: no layer of {depth} lies between these fractions; "
            "set them further apart"
        )
    return list(range(start, end))


def _matched(name: str) -> re.Match[str]:
    match = _BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name} lies in no numbered block")
    return match
