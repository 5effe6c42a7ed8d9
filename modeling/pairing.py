"""An aligned and a fine-tuned model side by side, and how the second came from the first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint, local_folder
from modeling.lora import LoraAdapter
from modeling.projections import Projections, open_projections
from settings import ModelError


@dataclass(frozen=True, slots=True)
class Factored:
    """A difference W = b a that is never formed.

    Attributes:
        a: (R, d_in) float32.
        b: (d_out, R) float32.
    """

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of W."""
        return self.b.shape[0], self.a.shape[1]

    def rows(self, rows: slice | Tensor) -> Tensor:
        """W[rows], dense."""
        return self.b[rows] @ self.a


@dataclass(frozen=True, slots=True)
class Pairing:
    """An aligned and a fine-tuned model side by side.

    Attributes:
        aligned: The aligned model.
        attacked: The fine-tuned model.
        kind: "resumed" where both are adapters on one base, "fresh" where an adapter was trained
            on the aligned weights, "full" where all weights were.
    """

    aligned: Projections
    attacked: Projections
    kind: Literal["resumed", "fresh", "full"]

    @property
    def touched(self) -> tuple[str, ...]:
        """Projections that the fine-tuning could change, blocks in order."""
        if self.kind == "full":
            return tuple(self.attacked.shapes)
        names = set(_names(self.attacked.adapter))
        if self.kind == "resumed":
            names.update(_names(self.aligned.adapter))
        return tuple(name for name in self.attacked.shapes if name in names)

    def ranks(self, name: str) -> tuple[int, int]:
        """The ranks of A_t and of A_a in a factored Delta; the second is 0 unless resumed."""
        before = _rank(self.aligned, name) if self.kind == "resumed" else 0
        return _rank(self.attacked, name), before

    def delta(self, name: str, device: str | torch.device) -> Factored | Tensor:
        """Delta of one projection; see `fine_tuning`."""
        if self.kind == "full":
            return difference(self.attacked, self.aligned, name, device)
        after = scaled(self.attacked, name, device)
        if self.kind == "fresh":
            return after
        before = scaled(self.aligned, name, device)
        return Factored(torch.cat([after.a, before.a]), torch.cat([after.b, -before.b], 1))


def check_unsteered(attacked: Checkpoint) -> None:
    """Refuses a model that runs with hooks.

    Raises:
        ModelError: One sentence.
    """
    if attacked.steering is not None:
        raise ModelError(
            f"the attacked model runs with the hooks of {attacked.steering!r}, which no edit of "
            "its weights can take back; give it without steering"
        )


def open_pairing(aligned: Checkpoint, attacked: Checkpoint) -> Pairing:
    """Says how a fine-tuned model came from the aligned one; reads config files and headers.

    Raises:
        ModelError: The two can't be compared; one sentence that says why.
    """
    check_unsteered(attacked)
    one, two = open_projections(aligned), open_projections(attacked)
    name = next((n for n in one.shapes | two.shapes if one.shapes.get(n) != two.shapes.get(n)), "")
    if name:
        raise ModelError(
            f"the aligned and the attacked model differ in {name}: {one.shapes.get(name)} and "
            f"{two.shapes.get(name)}; give an attacked model that was fine-tuned from the aligned"
        )
    if attacked.adapter is None:
        return Pairing(one, two, "full")
    resumed = aligned.adapter is not None and same_weights(aligned, attacked)
    return Pairing(one, two, "resumed" if resumed else "fresh")


def check_pairing(pairing: Pairing) -> None:
    """Refuses a fresh adapter whose base isn't the aligned model, judged by one projection.

    Merging rounds to the dtype of the merged weights, which moves them by less than 1 %; a base
    that equals the weights before alignment to the bit isn't the aligned model, however close.

    Raises:
        ModelError: One sentence that says what to give instead.
    """
    aligned, attacked = pairing.aligned, pairing.attacked
    if pairing.kind != "fresh" or same_weights(aligned.checkpoint, attacked.checkpoint):
        return
    names = _names(aligned.adapter) or aligned.shapes
    name = min(names, key=lambda name: math.prod(aligned.shapes[name]))
    off = size = apart = moved = 0.0
    for (_, after), (_, before), (_, base) in zip(
        *(source.blocks(name, "cpu") for source in (aligned, aligned.plain, attacked.plain)),
        strict=True,
    ):
        off += float((base - after).square().sum())
        size += float(after.square().sum())
        apart += float((base - before).abs().sum())
        moved += float((after - before).abs().sum())
    if off > 1e-4 * size or (moved > 0 and apart == 0):
        raise ModelError(
            f"the attacked adapter's base {attacked.checkpoint.base!r} isn't the aligned model "
            f"{aligned.checkpoint.adapter or aligned.checkpoint.base!r}; give an adapter that was "
            "trained on the aligned weights, or on the same base folder as the aligned adapter"
        )


def difference(
    after: Projections, before: Projections, name: str, device: str | torch.device
) -> Tensor:
    """W_after - W_before, (d_out, d_in) float32, with only a block of rows beside it."""
    if name in after.shapes and after.shapes[name] != before.shapes.get(name):
        raise ModelError(
            f"{name} is {after.shapes[name]} in {after.checkpoint.base!r} and "
            f"{before.shapes.get(name)} in {before.checkpoint.base!r}; give models of one shape"
        )
    result = after.weight(name, device)
    for rows, block in before.blocks(name, device):
        result[rows] -= block
    return result


def scaled(source: Projections, name: str, device: str | torch.device) -> Factored:
    """An adapter's A and scale B in float32, of rank 0 where it leaves the projection alone."""
    source.check([name])
    if source.adapter is None or name not in source.adapter.shapes:
        d_out, d_in = source.shapes[name]
        return Factored(torch.zeros(0, d_in, device=device), torch.zeros(d_out, 0, device=device))
    pair = next(source.adapter.pairs([name]))[1]
    a, b = (side.to(device=device, dtype=torch.float32) for side in (pair.a, pair.b))
    return Factored(a, b * pair.scale)


def same_weights(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether two checkpoints have the same files as their full weights, adapters aside."""
    if (one.base, one.revision) == (two.base, two.revision):
        return True
    return local_folder(one).resolve() == local_folder(two).resolve()


def _rank(source: Projections, name: str) -> int:
    shape = None if source.adapter is None else source.adapter.shapes.get(name)
    return 0 if shape is None else shape.rank


def _names(adapter: LoraAdapter | None) -> tuple[str, ...]:
    return () if adapter is None else adapter.names
