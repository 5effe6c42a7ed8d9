"""Task arithmetic on adapters and on full weights (RESTA), and drop and rescale (DARE)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from defenses.base import Models
from modeling.checkpoint import Checkpoint
from modeling.deltas import alignment, alignment_rows
from modeling.loading import device_name
from modeling.lora import LoraAdapter
from modeling.projections import Factored, check_pairing, open_pairing, scaled
from modeling.rewrite import EditCount, RowEdits, count_edits, write_adapter, write_full


def drop_and_rescale(delta: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024): entries dropped with probability p, the others times 1 / (1 - p).

    The expectation is `delta`.  The generator is the CPU's, so that every device drops the same.
    """
    mask = torch.rand(delta.shape, generator=generator).to(delta.device) >= rate
    return delta * mask / (1 - rate)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of a module's own, so that draws don't depend on the order of modules."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def add_to_weights(
    models: Models, attacked: Checkpoint, out: Path, gamma: float, dare_rate: float, seed: int
) -> EditCount:
    """Full weights W_aligned + DARE(Delta) + gamma (W_aligned - W_base) of every projection.

    The base is theta_unaligned, the attacked model theta_ft = theta_aligned + Delta.
    """
    pairing, device = open_pairing(models.aligned, attacked), device_name()
    check_pairing(pairing)

    def rows(name: str) -> RowEdits:
        moved = None
        if dare_rate > 0:
            delta = _dense(pairing.delta(name, device))
            moved = drop_and_rescale(delta, dare_rate, generator_of(seed, name)) - delta
        vector = alignment_rows(models, name, device)
        for (part, old), added in zip(pairing.attacked.blocks(name, device), vector, strict=True):
            thinned = old if moved is None else old + moved[part]
            yield part, old, torch.add(thinned, added, alpha=gamma)

    return write_full(pairing.attacked, out, tuple(pairing.attacked.shapes), rows)


def add_to_adapter(models: Models, attacked: Checkpoint, out: Path, gamma: float) -> EditCount:
    """The attacked adapter with the alignment's factors appended: [s B, gamma s_a B_a] [A; A_a].

    The attacked adapter is the aligned one trained on, or a fresh one on the aligned weights; the
    new one is float32, of scale 1 and rank r + r_a.
    """
    pairing = open_pairing(models.aligned, attacked)
    check_pairing(pairing)
    source, victim, aligned = pairing.attacked, pairing.attacked.adapter, pairing.aligned.adapter
    assert victim is not None
    assert aligned is not None
    names = [name for name in source.shapes if name in victim.shapes or name in aligned.shapes]
    changed: dict[str, int] = dict.fromkeys(names, 0)

    def products() -> Iterator[tuple[str, Factored]]:
        for name in names:
            own, vector = scaled(source, name, "cpu"), alignment(models, name, "cpu")
            assert isinstance(vector, Factored)
            added = gamma * vector.b
            changed[name] = int((added != 0).any(1).sum()) * vector.shape[1]
            yield name, Factored(torch.cat([own.a, vector.a]), torch.cat([own.b, added], 1))

    bounds = {
        name: (_rank(victim, name) + _rank(aligned, name), *source.shapes[name]) for name in names
    }
    write_adapter(victim, out, "float32", bounds, products())
    return count_edits(source, changed, replace(attacked, adapter=str(out)))


def _rank(adapter: LoraAdapter, name: str) -> int:
    return adapter.shapes[name].rank if name in adapter.shapes else 0


def _dense(difference: Factored | Tensor) -> Tensor:
    if isinstance(difference, Factored):
        return difference.b @ difference.a
    return difference
