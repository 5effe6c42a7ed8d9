"""Masks of safety-critical neurons: from scores to booleans, and to disk and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.importance import kth_largest, largest, pack_bits, unpack_bits
from modeling.lora import LoraAdapter

TopK = Literal["row", "tensor"]
Rounding = Literal["nearest", "down"]
MaskPair = tuple[Tensor, Tensor]


def cut(
    scores: Tensor, sparsity: float, topk: TopK, rounding: Rounding, generator: torch.Generator
) -> Tensor:
    """The mask of the top 1 - P_SR of scores (m, rows, columns), at least 0 (README, "Masks").

    "row" is the paper's, "tensor" the official code's of the low-rank score.
    """
    if topk == "row":
        return top_per_row(scores, sparsity, rounding)
    return torch.stack([above_threshold(each, sparsity, generator) for each in scores])


def top_per_row(scores: Tensor, sparsity: float, rounding: Rounding) -> Tensor:
    """The top 1 - P_SR of each row; of equal scores the leftmost come first.

    "nearest" keeps round(columns (1 - P_SR)) of them, "down" all but the official code's
    int(columns P_SR).
    """
    columns = scores.shape[-1]
    dropped = int(columns * sparsity)
    kept = round(columns * (1 - sparsity)) if rounding == "nearest" else columns - dropped
    return largest(scores, kept, "row")


def above_threshold(scores: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """The scores strictly above the one at int(n * P_SR) in ascending order (official code).

    Scores that tie with the threshold drop out.  A threshold of 0 would drop every zero, so
    then the n - int(n * P_SR) places are filled up with zeros drawn at random, on the CPU.
    """
    flat = scores.flatten()
    cut_at = int(flat.numel() * sparsity)
    if cut_at >= flat.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    if cut_at == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_largest(flat[None], flat.numel() - cut_at)[0, 0]
    mask = flat > threshold
    if threshold == 0:
        zeros = (flat == 0).nonzero().squeeze(1)
        missing = flat.numel() - cut_at - int(mask.sum())
        draw = torch.randperm(len(zeros), generator=generator)[:missing]
        mask[zeros[draw.to(zeros.device)]] = True
    return mask.reshape(scores.shape)


def save_masks(masks: Mapping[str, MaskPair], path: Path) -> None:
    """Writes {module: (mask of A, mask of B)} as safetensors, eight neurons to a byte."""
    packed = {
        f"{name}.{side}": pack_bits(mask)
        for name, pair in masks.items()
        for side, mask in zip("AB", pair, strict=True)
    }
    save_file(packed, path)


def load_masks(
    path: Path, adapter: LoraAdapter, names: list[str], device: str
) -> tuple[Tensor, Tensor]:
    """The masks of same-shaped modules, stacked: (m, r, d_in) and (m, d_out, r) bool."""
    sizes = adapter.shapes[names[0]]
    shapes = {"A": (sizes.rank, sizes.d_in), "B": (sizes.d_out, sizes.rank)}
    with safe_open(path, framework="pt") as file:
        a, b = (
            torch.stack([unpack_bits(file.get_tensor(f"{name}.{side}"), shape) for name in names])
            for side, shape in shapes.items()
        )
    return a.to(device), b.to(device)
