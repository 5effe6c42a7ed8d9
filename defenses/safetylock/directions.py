"""Which heads carry safety, and in which direction (Zhu et al., section 1; Li et al. 2023)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defenses.safetylock.probes import accuracy, fit_probes, log_loss

SplitRule = Literal["pairs", "tokens"]
ScoreRule = Literal["validation", "train_validation_mean", "log_loss"]
Precision = Literal["float64", "float32", "float16"]


@dataclass(frozen=True, slots=True)
class Directions:
    """One direction per head.

    Attributes:
        u: (layers, heads, head_dim) float32, unit vectors from unsafe to safe; zero where the
            two means are equal.
        sigma: (layers, heads) float32, standard deviation of the outputs along u.
    """

    u: Tensor
    sigma: Tensor


def mass_mean(outputs: Tensor, precision: Precision) -> Directions:
    """u = (mean safe - mean unsafe) / its norm; sigma = population std of a.u, classes pooled.

    `outputs` are (layers, heads, 2 N, r, head_dim), safe and unsafe rows in turn.  The arithmetic
    is numpy's in that precision: in "float16", the official code's, all but its means round on
    the way.
    """
    u = torch.zeros(*outputs.shape[:2], outputs.shape[-1])
    sigma = torch.zeros(outputs.shape[:2])
    for layer, of_layer in enumerate(outputs.to(getattr(torch, precision)).numpy()):
        for head, a in enumerate(of_layer):
            safe, unsafe = (a[at::2].reshape(-1, a.shape[-1]) for at in (0, 1))
            difference = safe.mean(0) - unsafe.mean(0)
            norm = np.linalg.norm(difference)
            if norm > 0:
                direction = difference / norm
                u[layer, head] = torch.from_numpy(direction)
                sigma[layer, head] = float((a @ direction).std())
    return Directions(u, sigma)


def split(rows: int, last_tokens: int, share: float, rule: SplitRule, seed: int) -> Tensor:
    """Which tokens of 2 N rows, safe and unsafe in turn, validate the probes: (rows, r) bool.

    "pairs" keeps all tokens of a pair on one side, so that none of an answer's tokens leaks across;
    "tokens" draws single tokens, as the official code does.
    """
    units = rows // 2 if rule == "pairs" else rows * last_tokens
    held_out = torch.zeros(units, dtype=torch.bool)
    held_out[random.Random(seed).sample(range(units), max(1, round(share * units)))] = True
    if rule == "tokens":
        return held_out.view(rows, last_tokens)
    return held_out.repeat_interleave(2)[:, None].expand(rows, last_tokens)


def scores(
    outputs: Tensor,
    held_out: Tensor,
    rule: ScoreRule,
    c: float,
) -> tuple[Tensor, Tensor]:
    """How well each head's linear probe tells safe from unsafe, all heads at once.

    Args:
        outputs: (layers, heads, 2 N, r, head_dim), safe and unsafe rows in turn.
        held_out: (2 N, r) bool, the tokens that validate.
        rule: "validation" accuracy; "train_validation_mean" of the two accuracies (official);
            "log_loss" is minus the validation loss, which tells apart heads that are all right.
        c: Inverse strength of the probes' L2 penalty.

    Returns:
        Score and validation accuracy, both (layers, heads) float32, the higher the better.
    """
    layers, heads, rows, last_tokens, width = outputs.shape
    x = outputs.reshape(layers * heads, rows * last_tokens, width)
    safe = (torch.arange(rows) % 2 == 0)[:, None].expand(rows, last_tokens).flatten()
    held_out = held_out.flatten()
    train, validation = (x[:, tokens] for tokens in (~held_out, held_out))
    y_train, y_validation = safe[~held_out], safe[held_out]
    probes = fit_probes(train, y_train, c)
    right = accuracy(probes, validation, y_validation)
    if rule == "validation":
        score = right
    elif rule == "log_loss":
        score = -log_loss(probes, validation, y_validation)
    else:
        score = (accuracy(probes, train, y_train) + right) / 2
    return score.float().view(layers, heads), right.float().view(layers, heads)


def top(score: Tensor, k: int) -> list[tuple[int, int]]:
    """The k best heads as (layer, head), best first; ties go to the lower layer, then head."""
    heads = score.shape[1]
    order = torch.sort(score.flatten(), descending=True, stable=True).indices[:k].tolist()
    return [divmod(index, heads) for index in order]


def overlap(sets: Sequence[Sequence[tuple[int, int]]]) -> float:
    """Mean Jaccard index of every two of the head sets; 1 where there is only one."""
    indices = [
        len({*a} & {*b}) / len({*a} | {*b})
        for position, a in enumerate(sets)
        for b in sets[position + 1 :]
    ]
    return sum(indices) / len(indices) if indices else 1.0
