"""Which neurons carry safety (paper: fine-grained safety neurons): Wanda scores and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from modeling.importance import top_share

Scope = Literal["tensor", "row", "layer"]

ROWS = 1024  # Rows whose absolute values are held at a time.


def neuron_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """I_i = sum_j |W_ij| ||X_j||_2: the Wanda scores of an output row, summed.

    Args:
        weight: W (d_out, d_in).
        norms: ||X_j||_2 on each of k sets of prompts, (d_in, k).

    Returns:
        (d_out, k) float32.
    """
    norms = norms.to(weight)
    return torch.cat([part.abs() @ norms for part in weight.split(ROWS)])


def top(scores: Mapping[str, Tensor], share: float, scope: Scope) -> dict[str, Tensor]:
    """Top_share of the scores of one layer.

    Args:
        scores: {projection: (d_out,) or (d_out, d_in)} of all projections of one layer.
        share: How much is taken.
        scope: Of each "tensor", of each "row" of a tensor, or of the "layer" as a whole.

    Returns:
        {projection: bool mask of the same shape}.
    """
    if scope != "layer":
        return {name: top_share(score, share, scope) for name, score in scores.items()}
    flat = top_share(torch.cat([score.flatten() for score in scores.values()]), share, "tensor")
    parts = flat.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def safety_mask(
    harmful: Mapping[str, Tensor], benign: Mapping[str, Tensor], q: float, p: float, scope: Scope
) -> dict[str, Tensor]:
    """Mask_l = TopQ(scores on harmful prompts) minus TopP(scores on benign prompts).

    Args:
        harmful: Scores of one layer, as of `top`.
        benign: Scores of that layer on benign prompts.
        q: Share taken of the harmful scores.
        p: Share of the benign scores that is left out of it.
        scope: Of both.
    """
    general = top(benign, p, scope)
    return {name: mask & ~general[name] for name, mask in top(harmful, q, scope).items()}


def find_q(share: Callable[[float], float], target: float, tolerance: float = 1e-4) -> float:
    """The q whose realised share is nearest to `target`, by bisection.

    Args:
        share: Share of edited weights by q; rises with q.
        target: The share wanted; at most `share(1.0)`.
        tolerance: Width of q at which the search ends.
    """
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < target else (low, middle)
    return min((high, low), key=lambda q: abs(share(q) - target))
