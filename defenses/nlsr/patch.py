"""The transplant of safety-critical neurons into an attacked adapter (paper: step 3)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from defenses.nlsr.masks import load_masks
from defenses.nlsr.select import masked_similarity
from modeling.lora import LoraAdapter, LoraPair, rewrite_adapter


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
        count.masked += int(mask_a.sum() + mask_b.sum())
        count.changed += int((a != pair.a).sum() + (b != pair.b).sum())
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(attacked, out, patched)
    return count
