"""The set difference of what safety and utility need (Wei et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from modeling.importance import top_share


def set_difference(safety: Tensor, utility: Tensor, q: float, p: float) -> Tensor:
    """S(p, q) = S^s(q) - S^u(p): top q on safety data minus top p on utility data, per matrix."""
    return top_share(safety, q, "tensor") & ~top_share(utility, p, "tensor")
