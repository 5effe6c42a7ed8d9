"""One-shot pruning of harmful weights (Antidote, Huang et al. 2024), merged or factor by factor.

On an adapter's own factors it prunes as the official code leaves an adapter behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from defenses.projection_edits import Rounding
from modeling.capture import SquareSums, TokenRow, adapter_linears, consume_inputs
from modeling.checkpoint import Checkpoint
from modeling.importance import (
    TokenPositions,
    counted_batches,
    counted_tokens,
    largest,
    wanda_scores,
)
from modeling.loading import load_decoder
from modeling.lora import LoraAdapter, LoraPair, rewrite_adapter


def prune_weight(
    weight: Tensor, norms: Tensor, dense_ratio: float, rounding: Rounding = "nearest"
) -> tuple[Tensor, Tensor]:
    """(1 - m) * W, m the top `dense_ratio` of each row's |W_ij| ||X_j||_2 on harmful data.

    Antidote's harmful mask is the top of the Wanda score (Sun et al. 2023) on its realignment
    data; the weights under it are removed.  W is (d_out, d_in), `norms` (d_in,).  "nearest" removes
    round(d_in dense_ratio) of a row, "down" all but int(d_in (1 - dense_ratio)).

    Returns:
        m (d_out, d_in) bool, and the pruned W.
    """
    d_in = weight.shape[1]
    removed = round(d_in * dense_ratio)
    if rounding == "down":
        removed = d_in - int(d_in * (1 - dense_ratio))
    mask = largest(wanda_scores(weight, norms), removed, "row")
    return mask, weight.masked_fill(mask, 0.0)


def factor_norms(
    checkpoint: Checkpoint,
    adapter: LoraAdapter,
    rows: Sequence[TokenRow],
    batch_size: int,
    positions: TokenPositions,
) -> dict[str, Tensor]:
    """||X_j||_2 of what enters A, and ||Z_k||_2 of what enters B, Z = X A^T.

    Returns:
        {"MODULE.A": (d_in,), "MODULE.B": (r,)} float64, on the CPU.
    """
    model: Any = load_decoder(checkpoint)
    squares = SquareSums()
    data = counted_batches(checkpoint, rows, batch_size, str(model.device), positions)
    linears = adapter_linears(model, adapter.names)
    counted = partial(counted_tokens, positions=positions)
    consume_inputs(model.get_base_model().base_model, linears, data, counted, squares.add)
    return {name: sums.sqrt().cpu() for name, sums in squares.sums.items()}


def prune_factors(
    adapter: LoraAdapter,
    out: Path,
    norms: dict[str, Tensor],
    dense_ratio: float,
    rounding: Rounding = "nearest",
) -> tuple[int, dict[str, int]]:
    """Writes the adapter with the top `dense_ratio` of each row of A and of B zeroed.

    Returns:
        How many scalars were masked, and by module how many of them weren't zero.
    """
    masked, changed = 0, {}

    def edit(name: str, pair: LoraPair) -> LoraPair:
        nonlocal masked
        mask_a, a = prune_weight(pair.a, norms[f"{name}.A"], dense_ratio, rounding)
        mask_b, b = prune_weight(pair.b, norms[f"{name}.B"], dense_ratio, rounding)
        masked += int(mask_a.sum() + mask_b.sum())
        changed[name] = int((a != pair.a).sum() + (b != pair.b).sum())
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(adapter, out, edit)
    return masked, changed
