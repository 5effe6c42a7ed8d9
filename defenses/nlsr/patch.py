"""Which modules get the safety-critical neurons, and the transplant (paper: step 3).

The paper repairs the less similar modules the more often; the official code, by its sign, the
more similar ones.  `order` says which, `rule` which formula turns ranks into probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from defenses.nlsr.masks import load_masks
from modeling.lora import LoraAdapter, LoraPair, product_cosine, rewrite_adapter

Order = Literal["least_similar", "most_similar"]
Rule = Literal["linear", "min_max"]
Precision = Literal["float64", "float32"]
Pair = tuple[Tensor, Tensor]


def masked_similarity(reference: Pair, attacked: Pair, masks: Pair) -> Tensor:
    """S = cos(vec((M_B*B_e)(M_A*A_e)), vec((M_B*B_t)(M_A*A_t))) (paper: step 3), (m,) in float64.

    Of pairs (m, r, d_in), (m, d_out, r); d_out x d_in is never formed (`product_cosine`).
    """
    sides = (
        side.where(mask, 0)
        for pair in (reference, attacked)
        for side, mask in zip(pair, masks, strict=True)
    )
    return product_cosine(*sides)


def patch_probabilities(
    similarities: Sequence[float],
    prune_rate: float,
    delta: float,
    order: Order,
    rule: Rule,
    precision: Precision = "float64",
) -> Tensor:
    """The probability of each module to be patched, (N,) in that precision.

    "linear" is the paper's P_j = P_L + delta * rank_j / N, the probability of gamma_j = 1 that
    module j is left alone, with P_L = 1 - prune_rate - delta / 2; it is patched with 1 - P_j.
    "min_max" is the official clip((prune_rate - eps) + 2 eps norm_j, 0, 1), the probability of
    being patched, with eps = delta / 2 and norm_j in [0, 1] by rank (0.5 for a single module).
    """
    n = len(similarities)
    sign = 1 if order == "least_similar" else -1
    likeliest_first = sorted(range(n), key=lambda j: (sign * similarities[j], j))
    position = torch.empty(n, dtype=getattr(torch, precision))
    position[likeliest_first] = torch.arange(n, dtype=position.dtype)
    if rule == "linear":
        raw = 1 - ((1 - prune_rate - delta / 2) + delta * (position + 1) / n)
    else:
        norm = (n - 1 - position) / (n - 1) if n > 1 else position + 0.5
        raw = (prune_rate - delta / 2) + delta * norm
    return raw.clamp(0, 1)


def draw(probabilities: Tensor, seed: int) -> list[bool]:
    """One Bernoulli draw per module, in order; the same seed gives the same draw.

    Random numbers are drawn in the probabilities' precision.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(probabilities, generator=generator).bool().tolist()


def below(similarities: Sequence[float], tau: float) -> list[bool]:
    """Threshold mode: a module is patched if S < tau."""
    return [s < tau for s in similarities]


@dataclass(slots=True)
class PatchCount:
    """How many scalars the masks of the patched modules select, and how many really changed."""

    masked: int = 0
    changed: int = 0


def similarities(
    reference: LoraAdapter, attacked: LoraAdapter, masks: Path, device: str
) -> dict[str, float]:
    """S per module, in the reference's order, computed a stack of same-shaped modules at a time."""
    by_module: dict[str, float] = {}
    for names in reference.groups():
        scores = masked_similarity(
            reference.stack(names, device),
            attacked.stack(names, device),
            load_masks(masks, reference, names, device),
        )
        by_module.update(zip(names, scores.tolist(), strict=True))
    return {name: by_module[name] for name in reference.names}


def splice(
    reference: LoraAdapter, attacked: LoraAdapter, masks: Path, modules: Collection[str], out: Path
) -> PatchCount:
    """Writes A <- where(M_A, A_e, A_t), B <- where(M_B, B_e, B_t) for the selected modules.

    The paper writes the patch as a sum of two masked products; splicing A and B also yields the
    cross terms between reference and attacked neurons.  Modules that aren't selected stay as
    they are, to the bit.
    """
    count = PatchCount()

    def patched(name: str, pair: LoraPair) -> LoraPair | None:
        if name not in modules:
            return None
        (_, source), *_ = reference.pairs([name])
        mask_a, mask_b = (mask[0] for mask in load_masks(masks, reference, [name], "cpu"))
        a = torch.where(mask_a, source.a.to(pair.a.dtype), pair.a)
        b = torch.where(mask_b, source.b.to(pair.b.dtype), pair.b)
        count.masked += int(mask_a.count_nonzero() + mask_b.count_nonzero())
        count.changed += int((a != pair.a).count_nonzero() + (b != pair.b).count_nonzero())
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(attacked, out, patched)
    return count
