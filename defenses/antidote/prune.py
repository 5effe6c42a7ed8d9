"""One-shot pruning of harmful weights (Antidote, Huang et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from modeling.importance import top_share, wanda_scores


def pruned(weight: Tensor, norms: Tensor, dense_ratio: float) -> tuple[Tensor, Tensor]:
    """(1 - m) * W, m the top `dense_ratio` of each row's |W_ij| ||X_j||_2 on harmful data.

    Antidote's harmful mask is the top of the Wanda score (Sun et al. 2023) on its realignment
    data; the weights under it are removed.

    Args:
        weight: W of the attacked model, (d_out, d_in).
        norms: ||X_j||_2 on the harmful rows, (d_in,).
        dense_ratio: Share of each row.

    Returns:
        m (d_out, d_in) bool, and the pruned W.
    """
    mask = top_share(wanda_scores(weight, norms), dense_ratio, "row")
    return mask, weight.masked_fill(mask, 0.0)
