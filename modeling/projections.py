"""The linear projections of a model's decoder blocks: which there are, and their merged weights.

Everything is read from the files, a projection at a time and a block of rows after another, so
that no second copy of a weight is held in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from modeling.architectures import LLAMA_LIKE
from modeling.checkpoint import Checkpoint, local_folder
from modeling.inspection import require_own_names
from modeling.lora import LoraAdapter, LoraPair, mergeable_adapter, merged_rows
from modeling.model_files import FLOATS, StoredTensor, stored_tensors
from settings import ModelError

_WEIGHT = re.compile(r"^(?P<name>.*\.(?P<block>\d+)\..*)\.weight$")


@dataclass(frozen=True, slots=True)
class Projections:
    """A model's projections on disk; its adapter counts, its `steering` plays no part.

    `shapes` are {module path: (d_out, d_in)}, blocks in order; `tensors` say where weights lie.
    """

    checkpoint: Checkpoint
    adapter: LoraAdapter | None
    shapes: dict[str, tuple[int, int]]
    tensors: dict[str, StoredTensor]

    @property
    def plain(self) -> Projections:
        """The full weights without the adapter."""
        return replace(self, adapter=None)

    def check(self, names: Iterable[str]) -> None:
        """Refuses, with a ModelError, names that are no projections of this model."""
        if unknown := sorted(set(names).difference(self.shapes)):
            raise ModelError(
                f"{self.checkpoint.base!r} has no projection {unknown[0]} in its blocks; use what "
                "was made for this model"
            )

    def blocks(self, name: str, device: str | torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, W[rows]) with W = W_0 + scale B A, (rows, d_in) float32 on `device`.

        The blocks are the same ones each time, so that reading twice gives the same bits.

        Raises:
            ModelError: There is no such projection.
        """
        self.check([name])
        return merged_rows(self.tensors[name], self._pair(name), device)

    def weight(self, name: str, device: str | torch.device) -> Tensor:
        """The whole merged W of a projection, (d_out, d_in) float32; see `blocks`."""
        weight = torch.empty(self.shapes.get(name, (0, 0)), device=device)
        for rows, block in self.blocks(name, device):
            weight[rows] = block
        return weight

    def _pair(self, name: str) -> LoraPair | None:
        if self.adapter is None or name not in self.adapter.shapes:
            return None
        return next(self.adapter.pairs([name]))[1]


def open_projections(checkpoint: Checkpoint) -> Projections:
    """Finds a model's projections; only config files and headers are read.

    Raises:
        ModelError: The weights can't be found or aren't plain floats, or the adapter is more than
            LoRA on linear projections of this model.
    """
    require_own_names(checkpoint)
    blocks: dict[str, int] = {}
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored_tensors(local_folder(checkpoint)).items():
        match = _WEIGHT.match(key)
        if match is None or len(tensor.shape) != 2:
            continue
        if tensor.code not in FLOATS:
            raise ModelError(
                f"{key} of {checkpoint.base!r} is {tensor.code}; use weights that are not quantised"
            )
        blocks[match["name"]] = int(match["block"])
        tensors[match["name"]] = tensor
    if not tensors:
        raise ModelError(
            f"{checkpoint.base!r} has no linear projections in numbered blocks; choose {LLAMA_LIKE}"
        )
    names = sorted(tensors, key=lambda name: (blocks[name], name))
    shapes = {name: (tensors[name].shape[0], tensors[name].shape[1]) for name in names}
    adapter = mergeable_adapter(checkpoint, "model.adapter", otherwise="")
    if adapter is not None:
        adapter.check(shapes)
    return Projections(checkpoint, adapter, shapes, tensors)


def projections(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """{module path: (d_out, d_in)} of the blocks' linear projections, see `open_projections`.

    They come in the order of the blocks, e.g. "model.layers.0.self_attn.q_proj"; biases, norms,
    embeddings and the head are not among them.
    """
    return open_projections(checkpoint).shapes


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """The weight of one projection, its adapter merged: (d_out, d_in) float32, on the CPU."""
    return open_projections(checkpoint).weight(name, "cpu")


@dataclass(frozen=True, slots=True)
class Factored:
    """A difference W = b a that is never formed: a (R, d_in), b (d_out, R), float32."""

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

    Its kind is "resumed" where both are adapters on one base, "fresh" where an adapter was trained
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
    """Refuses, with a ModelError, a model that runs with hooks."""
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
    result = torch.empty(after.shapes.get(name, (0, 0)), device=device)
    for (rows, new), (_, old) in zip(
        after.blocks(name, device), before.blocks(name, device), strict=True
    ):
        torch.sub(new, old, out=result[rows])
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
