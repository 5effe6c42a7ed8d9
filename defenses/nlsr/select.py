"""Which modules are patched: similarity, probabilities and the draw (paper: step 3).

The paper repairs the less similar modules the more often; the official code, by its sign, the
more similar ones.  `order` says which, `rule` which formula turns ranks into probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modeling.lora import product_cosine

Order = Literal["least_similar", "most_similar"]
Rule = Literal["linear", "min_max"]
Pair = tuple[Tensor, Tensor]


def masked_similarity(reference: Pair, attacked: Pair, masks: Pair) -> Tensor:
    """S = cos(vec((M_B*B_e)(M_A*A_e)), vec((M_B*B_t)(M_A*A_t))) (paper: step 3), (m,) in float64.

    Of pairs (m, r, d_in), (m, d_out, r); d_out x d_in is never formed (`product_cosine`).
    """
    mask_a, mask_b = masks
    return product_cosine(
        reference[0] * mask_a, reference[1] * mask_b, attacked[0] * mask_a, attacked[1] * mask_b
    )


def patch_probabilities(
    similarities: Sequence[float], prune_rate: float, delta: float, order: Order, rule: Rule
) -> list[float]:
    """The probability of each module to be patched.

    "linear" is the paper's P_j = P_L + delta * rank_j / N, the probability of gamma_j = 1 that
    module j is left alone, with P_L = 1 - prune_rate - delta / 2; it is patched with 1 - P_j.
    "min_max" is the official clip((prune_rate - eps) + 2 eps norm_j, 0, 1), the probability of
    being patched, with eps = delta / 2 and norm_j in [0, 1] by rank (0.5 for a single module).
    """
    n = len(similarities)
    sign = 1 if order == "least_similar" else -1
    likeliest_first = sorted(range(n), key=lambda j: (sign * similarities[j], j))
    probabilities = [0.0] * n
    for position, j in enumerate(likeliest_first):
        if rule == "linear":
            keep = (1 - prune_rate - delta / 2) + delta * (position + 1) / n
            raw = 1 - keep
        else:
            norm = 1 - position / (n - 1) if n > 1 else 0.5
            raw = (prune_rate - delta / 2) + delta * norm
        probabilities[j] = min(max(raw, 0.0), 1.0)
    return probabilities


def draw(probabilities: Sequence[float], seed: int) -> list[bool]:
    """One Bernoulli draw per module, in order; the same seed gives the same draw."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.tensor(probabilities, dtype=torch.float64)
    return torch.bernoulli(chances, generator=generator).bool().tolist()


def below(similarities: Sequence[float], tau: float) -> list[bool]:
    """Threshold mode: a module is patched if S < tau."""
    return [s < tau for s in similarities]
