"""The aligned model in the form of an attacked one: adapter, empty adapter, or full weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.checkpoint import Checkpoint, local_folder
from modeling.deltas import rewrite_weights
from modeling.lora import LoraAdapter, LoraPair, open_adapter, rewrite_adapter
from modeling.model_files import read_header, weight_files
from settings import ModelError


@dataclass(frozen=True, slots=True)
class Restored:
    """What was written.

    Attributes:
        defended: The aligned model, its files in the folder that was asked for.
        changed: How many scalars of the attacked model's effective weights (an adapter's
            product added) are others now.
        modules: Projections and other tensors that changed.
    """

    defended: Checkpoint
    changed: int
    modules: tuple[str, ...]


def copy_adapter(aligned: Checkpoint, attacked: Checkpoint, out: Path) -> Restored:
    """Copies the aligned adapter, byte by byte; for an attack that resumed it."""
    source = open_adapter(str(aligned.adapter), "model.aligned")
    victim = open_adapter(str(attacked.adapter), "the attacked model")
    out.mkdir(parents=True, exist_ok=True)
    for path in source.folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    shapes = {**victim.shapes, **source.shapes}
    changed = [name for name in shapes if not _same_pair(name, source, victim)]
    count = sum(shapes[name].d_out * shapes[name].d_in for name in changed)
    return Restored(replace(attacked, adapter=str(out)), count, tuple(changed))


def empty_adapter(attacked: Checkpoint, out: Path) -> Restored:
    """Writes the attacked adapter with B = 0; for one on aligned weights, where it adds nothing."""
    victim = open_adapter(str(attacked.adapter), "the attacked model")
    changed: list[str] = []

    def emptied(name: str, pair: LoraPair) -> LoraPair | None:
        if bool(pair.a.any()) and bool(pair.b.any()):
            changed.append(name)
        return LoraPair(pair.a, torch.zeros_like(pair.b), pair.scale)

    rewrite_adapter(victim, out, emptied)
    count = sum(victim.shapes[name].d_out * victim.shapes[name].d_in for name in changed)
    return Restored(replace(attacked, adapter=str(out)), count, tuple(changed))


def write_aligned(aligned: Checkpoint, attacked: Checkpoint, out: Path) -> Restored:
    """Writes the aligned weights, an adapter merged; for an attack that trained all weights.

    Raises:
        ModelError: The attacked model isn't of the aligned one's shape.
    """
    source = replace(aligned, dtype=attacked.dtype)
    defended = rewrite_weights(source, out, lambda name, weight: None).defended
    differing = _differing_scalars(out, local_folder(attacked), getattr(torch, attacked.dtype))
    changed = {name: count for name, count in differing.items() if count}
    return Restored(defended, sum(changed.values()), tuple(changed))


def _same_pair(name: str, source: LoraAdapter, victim: LoraAdapter) -> bool:
    if name not in source.shapes or name not in victim.shapes:
        return False
    (_, old), *_ = victim.pairs([name])
    (_, new), *_ = source.pairs([name])
    return old.scale == new.scale and torch.equal(old.a, new.a) and torch.equal(old.b, new.b)


def _differing_scalars(left: Path, right: Path, dtype: torch.dtype) -> dict[str, int]:
    """{module or parameter: how many scalars differ}, one tensor of each in memory.

    A tensor that one of the folders leaves out is tied to one that it holds.
    """
    counts: dict[str, int] = {}
    files = _files(right)
    for name, path in _files(left).items():
        if name not in files:
            continue
        ours, theirs = _read(path, name).to(dtype), _read(files[name], name).to(dtype)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{name} is {tuple(ours.shape)} in the aligned model and {tuple(theirs.shape)} in "
                "the attacked one; repair a model that was fine-tuned from model.aligned"
            )
        counts[name.removesuffix(".weight")] = int((ours != theirs).sum())
    return counts


def _files(folder: Path) -> Mapping[str, Path]:
    return {
        name: folder / file
        for file in weight_files(folder, "the attacked model")
        for name in read_header(folder / file)[0]
    }


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
