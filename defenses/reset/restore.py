"""The aligned model in the form of an attacked one: adapter, empty adapter, or full weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from modeling.checkpoint import Checkpoint, local_folder
from modeling.lora import LoraAdapter, LoraPair, rewrite_adapter
from modeling.model_files import stored_tensors
from modeling.projections import Pairing
from modeling.rewrite import EditCount, count_differing, count_edits, rewrite_weights
from modeling.stored import read_rows
from settings import ModelError


def copy_adapter(pairing: Pairing, out: Path) -> EditCount:
    """Copies the aligned adapter, byte by byte; for an attack that resumed it."""
    source, victim = pairing.aligned.adapter, pairing.attacked.adapter
    assert source is not None
    assert victim is not None
    out.mkdir(parents=True, exist_ok=True)
    for path in source.folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    names = {**victim.shapes, **source.shapes}
    return _count(pairing, {name: not _same_pair(name, source, victim) for name in names}, out)


def empty_adapter(pairing: Pairing, out: Path) -> EditCount:
    """Writes the attacked adapter with B = 0; for one on aligned weights, where it adds nothing."""
    victim = pairing.attacked.adapter
    assert victim is not None
    changed: dict[str, bool] = {}

    def emptied(name: str, pair: LoraPair) -> LoraPair:
        changed[name] = bool(pair.a.any()) and bool(pair.b.any())
        return LoraPair(pair.a, torch.zeros_like(pair.b), pair.scale)

    rewrite_adapter(victim, out, emptied)
    return _count(pairing, changed, out)


def write_aligned(aligned: Checkpoint, attacked: Checkpoint, out: Path) -> EditCount:
    """Writes the aligned weights, an adapter merged; for an attack that trained all weights."""
    source = replace(aligned, dtype=attacked.dtype)
    count = rewrite_weights(source, out, lambda name, weight: None, names=())
    differing = _differing_scalars(out, local_folder(attacked), getattr(torch, attacked.dtype))
    changed = {name: scalars for name, scalars in differing.items() if scalars}
    return replace(count, changed=sum(changed.values()), modules=tuple(changed))


def _count(pairing: Pairing, changed: Mapping[str, bool], out: Path) -> EditCount:
    """The edit of an adapter, in which a projection changes as a whole or not at all."""
    shapes, attacked = pairing.attacked.shapes, pairing.attacked.checkpoint
    scalars = {name: math.prod(shapes[name]) if other else 0 for name, other in changed.items()}
    return count_edits(pairing.attacked, scalars, replace(attacked, adapter=str(out)))


def _same_pair(name: str, source: LoraAdapter, victim: LoraAdapter) -> bool:
    if name not in source.shapes or name not in victim.shapes:
        return False
    (_, old), *_ = victim.pairs([name])
    (_, new), *_ = source.pairs([name])
    return old.scale == new.scale and torch.equal(old.a, new.a) and torch.equal(old.b, new.b)


def _differing_scalars(written: Path, attacked: Path, dtype: torch.dtype) -> dict[str, int]:
    """{module or parameter: how many scalars differ}, some rows of each in memory.

    A tensor that one of the folders leaves out is tied to one that it holds.
    """
    counts: dict[str, int] = {}
    files = stored_tensors(attacked, "the attacked model")
    for name, stored in stored_tensors(written).items():
        if name not in files:
            continue
        other = files[name]
        if stored.shape != other.shape:
            raise ModelError(
                f"{name} is {stored.shape} in the aligned model and {other.shape} in the attacked "
                "one; give a model that was fine-tuned from model.aligned"
            )
        counts[name.removesuffix(".weight")] = sum(
            count_differing(ours.to(dtype), theirs.to(dtype))
            for (_, ours), (_, theirs) in zip(read_rows(stored), read_rows(other), strict=True)
        )
    return counts
