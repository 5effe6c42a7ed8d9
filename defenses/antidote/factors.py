"""Antidote on an adapter's own factors, as the official code leaves an adapter behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defenses.antidote.prune import pruned
from modeling.capture import SquareSums, TokenRow, batches, captured_inputs
from modeling.checkpoint import Checkpoint
from modeling.importance import TokenPositions, counted_tokens
from modeling.loading import load_model
from modeling.lora import LoraPair, open_adapter, rewrite_adapter


@dataclass(slots=True)
class Pruned:
    """How many scalars of A and B were masked, how many of them weren't zero, and where."""

    masked: int = 0
    changed: int = 0
    modules: tuple[str, ...] = ()


def factor_norms(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    batch_size: int,
    positions: TokenPositions,
) -> dict[str, Tensor]:
    """||X_j||_2 of what enters A, and ||Z_k||_2 of what enters B, Z = X A^T.

    Args:
        checkpoint: A model with an adapter.
        rows: (prompt ids, answer ids).
        batch_size: Rows per forward pass.
        positions: Which tokens count.

    Returns:
        {"MODULE.A": (d_in,), "MODULE.B": (r,)} float64, on the CPU.
    """
    model: Any = load_model(checkpoint).eval()
    active, core = model.active_adapter, model.get_base_model()
    linears: dict[str, nn.Module] = {}
    for name in open_adapter(str(checkpoint.adapter), "the attacked model").names:
        layer = core.get_submodule(name)
        linears |= {f"{name}.A": layer.lora_A[active], f"{name}.B": layer.lora_B[active]}
    squares = SquareSums()
    with captured_inputs(linears, squares.add) as focus, torch.no_grad():
        for batch in batches(rows, batch_size, str(model.device), by_length=True):
            focus.positions = counted_tokens(batch, positions)
            core.base_model(**batch.inputs, use_cache=False)
    return {name: sums.sqrt().cpu() for name, sums in squares.sums.items()}


def prune_factors(
    attacked: Checkpoint, out: Path, norms: dict[str, Tensor], dense_ratio: float
) -> Pruned:
    """Writes the adapter with the top `dense_ratio` of each row of A and of B zeroed.

    Args:
        attacked: A model with an adapter.
        out: The folder of the pruned adapter.
        norms: Of `factor_norms`.
        dense_ratio: Share of each row.
    """
    count = Pruned()
    modules: list[str] = []

    def edit(name: str, pair: LoraPair) -> LoraPair:
        mask_a, a = pruned(pair.a, norms[f"{name}.A"], dense_ratio)
        mask_b, b = pruned(pair.b, norms[f"{name}.B"], dense_ratio)
        changed = int((a != pair.a).sum() + (b != pair.b).sum())
        count.masked += int(mask_a.sum() + mask_b.sum())
        count.changed += changed
        if changed:
            modules.append(name)
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(open_adapter(str(attacked.adapter), "the attacked model"), out, edit)
    count.modules = tuple(modules)
    return count
