"""The linear projections of a model's decoder blocks: which there are, and their merged weights.

Everything is read from the files, a projection at a time and a block of rows after another, so
that no second copy of a weight is held in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling.architectures import LLAMA_LIKE
from modeling.checkpoint import Checkpoint, local_folder
from modeling.lora import LoraAdapter, LoraPair, merge, mergeable_adapter
from modeling.model_files import FLOATS, StoredTensor, stored_tensors
from settings import ModelError

_WEIGHT = re.compile(r"^(?P<name>.*\.(?P<block>\d+)\..*)\.weight$")
# Scalars of a block of rows: 4 MiB in float32.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Projections:
    """A model's projections on disk; its adapter counts, its `steering` plays no part.

    Attributes:
        checkpoint: The model.
        adapter: Its adapter, plain LoRA, or None.
        shapes: {module path: (d_out, d_in)}, blocks in order.
        tensors: {module path: where its weight lies}.
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
        """Refuses names that are no projections of this model.

        Raises:
            ModelError: One sentence that names the first.
        """
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
        d_out, d_in = self.shapes[name]
        pair = self._pair(name)
        step = max(1, _BLOCK // d_in)
        stored = self.tensors[name]
        dtype: torch.dtype = getattr(torch, FLOATS[stored.code])
        # Read, not mapped: a mapped file keeps all that was read of it in memory.
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, d_out, step):
                rows = slice(start, min(start + step, d_out))
                data = bytearray(file.read((rows.stop - start) * d_in * dtype.itemsize))
                block = torch.frombuffer(data, dtype=dtype).reshape(-1, d_in).to(device)
                if pair is None:
                    yield rows, block.float()
                    continue
                part = LoraPair(pair.a.to(device), pair.b[rows].to(device), pair.scale)
                yield rows, merge(block, part)

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
    _check_adapter(adapter, shapes)
    return Projections(checkpoint, adapter, shapes, tensors)


def projections(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every linear projection inside the decoder blocks, from headers alone.

    Biases, norms, embeddings and the head are not among them.

    Returns:
        {module path, e.g. "model.layers.0.self_attn.q_proj": (d_out, d_in)}, blocks in order.

    Raises:
        ModelError: See `open_projections`.
    """
    return open_projections(checkpoint).shapes


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """The weight of one projection, its adapter merged: (d_out, d_in) float32, on the CPU.

    Raises:
        ModelError: There is no such projection; see also `open_projections`.
    """
    return open_projections(checkpoint).weight(name, "cpu")


def _check_adapter(adapter: LoraAdapter | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    if adapter is None:
        return
    for name, shape in adapter.shapes.items():
        if shapes.get(name) != (shape.d_out, shape.d_in):
            raise ModelError(
                f"the adapter {str(adapter.folder)!r} edits {name} "
                f"({shape.d_out}, {shape.d_in}), which is no projection in the blocks of its "
                "base; use a LoRA on the projections of this model"
            )
