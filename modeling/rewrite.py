"""A model with edited weights, written as a plain folder tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint, local_folder
from modeling.loading import copy_tokenizer, device_name
from modeling.lora import LoraAdapter, merged_weights, tensor_name
from modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FLOATS,
    read_header,
    stored_tensors,
    weight_files,
)
from modeling.projections import Factored, Projections, check_unsteered, open_projections
from modeling.shards import Content, copy_besides, new_folder, write_shards, write_tensors
from settings import ModelError

WeightEdit = Callable[[str, Tensor], Tensor | None]
# (rows, the attacked model's rows, the new rows), float32.
RowEdits = Iterator[tuple[slice, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class EditCount:
    """What an edit changed.

    Attributes:
        changed: Scalars of the projections' effective weights that differ from the attacked
            model's; of an adapter's projection every scalar of a row whose row of b differs.
        total: Scalars of all projections that the edit was asked about.
        defended: The model that was written.
        modules: The projections in which something changed, blocks in order.
    """

    changed: int
    total: int
    defended: Checkpoint
    modules: tuple[str, ...] = ()


def rewrite_weights(
    attacked: Checkpoint, out: Path, edit: WeightEdit, *, names: Collection[str] | None = None
) -> EditCount:
    """Writes full weights with W' = edit(name, W) in place of projections W.

    An adapter is merged in float32 and everything is then cast to the checkpoint's dtype.  Config,
    tokenizer and generation config are copied.  Memory holds one tensor at a time.

    `edit` gets a module path and W (d_out, d_in) float32 on `device_name()`, and returns W', or
    None to leave W as it is; it may work in place.  `names` are the projections that it is asked
    about, None for all of the blocks.  The folder `out` must be missing or empty.

    Raises:
        ModelError: There is no such projection, the model has hooks, or what is written isn't
            finite.
    """
    check_unsteered(attacked)
    source, device = open_projections(attacked), device_name()
    source.check(names or ())

    def rows(name: str) -> RowEdits | None:
        new = edit(name, source.weight(name, device))
        if new is None:
            return None
        return ((part, old, new[part]) for part, old in source.blocks(name, device))

    wanted = tuple(name for name in source.shapes if names is None or name in names)
    return write_full(source, out, wanted, rows)


def write_full(
    source: Projections,
    out: Path,
    names: Collection[str],
    replaced: Callable[[str], RowEdits | None],
) -> EditCount:
    """One output file per input file, everything but `names` copied from the attacked model."""
    checkpoint = source.checkpoint
    if checkpoint.dtype not in FLOATS.values():
        dtypes = ", ".join(FLOATS.values())
        raise ModelError(f"model.dtype={checkpoint.dtype} can't be written; set it to {dtypes}")
    folder, kind = local_folder(checkpoint), getattr(torch, checkpoint.dtype)
    changed, stored = dict.fromkeys(names, 0), stored_tensors(folder)
    kept = {} if source.adapter is None else merged_weights(source.adapter, stored)

    def content(name: str) -> Content:
        key = f"{name}.weight"
        if (rows := replaced(name)) is not None:
            return counted(name, rows)
        return kept[key]() if key in kept else stored[key]

    def counted(name: str, rows: RowEdits) -> Iterator[Tensor]:
        for _, old, new in rows:
            value = new.to(kind)
            changed[name] += count_differing(value, old.to(kind))
            yield value

    computed = kept | {f"{name}.weight": partial(content, name) for name in names}
    shards = {file: _shapes(folder / file) for file in weight_files(folder)}
    with new_folder(out) as part:
        write_shards(folder, part, shards, checkpoint.dtype, computed)
        copy_tokenizer(checkpoint, part)
        config = json.loads((folder / "config.json").read_text())
        config |= {"dtype": checkpoint.dtype, "torch_dtype": checkpoint.dtype}
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return count_edits(source, changed, Checkpoint(str(out), dtype=checkpoint.dtype))


def count_differing(new: Tensor, old: Tensor) -> int:
    """How many scalars of two tensors of one shape and dtype differ; 0 is -0."""
    if new.is_cuda:
        return int((new != old).sum())
    # Several times as fast as torch compares and counts; no difference of two rounds to zero.
    bits = {2: torch.int16, 4: torch.int32}[new.itemsize]
    return int(np.count_nonzero((new - old).abs_().view(bits).numpy()))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    header = read_header(path)[0]
    for key, entry in header.items():
        if entry["dtype"] not in FLOATS:
            raise ModelError(
                f"{key} of {str(path)!r} is {entry['dtype']}; use weights that are not quantised"
            )
    return {key: tuple(entry["shape"]) for key, entry in header.items()}


def write_adapter(
    source: LoraAdapter,
    out: Path,
    dtype: str,
    bounds: Mapping[str, tuple[int, int, int]],
    products: Iterable[tuple[str, Factored]],
) -> None:
    """Writes an adapter folder of other ranks and of scale 1, one module in memory at a time.

    The source's config is taken over otherwise; the folder `out` must be missing or empty.

    `bounds` are {module path: (largest rank, d_out, d_in)} in their order, `products` what is
    added to the base; one of rank 0 is left out.

    Raises:
        ModelError: A product isn't finite in `dtype`.
    """
    ranks: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, product in products:
            if rank := product.a.shape[0]:
                ranks[name] = rank
                yield tensor_name(name, "A"), product.a.cpu()
                yield tensor_name(name, "B"), product.b.cpu()

    room: dict[str, tuple[int, ...]] = {}
    for name, (rank, d_out, d_in) in bounds.items():
        room |= {tensor_name(name, "A"): (rank, d_in), tensor_name(name, "B"): (d_out, rank)}
    with new_folder(out) as part:
        write_tensors(part / ADAPTER_WEIGHTS, room, dtype, tensors())
        config = _adapter_config(source, ranks)
        (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_besides(source.folder, part)


def count_edits(source: Projections, changed: Mapping[str, int], defended: Checkpoint) -> EditCount:
    """The `EditCount` of {projection that the edit was asked about: changed scalars}."""
    return EditCount(
        changed=sum(changed.values()),
        total=sum(math.prod(source.shapes[name]) for name in changed),
        defended=defended,
        modules=tuple(name for name, count in changed.items() if count),
    )


def _adapter_config(adapter: LoraAdapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter's config with new ranks and scale 1 everywhere.

    `r` is the largest rank and equals `lora_alpha`, so that engines which read no patterns
    reserve enough room and scale right.
    """
    top = max(ranks.values())
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != top}
    config = {
        **adapter.config,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
    }
    if set(ranks) != set(adapter.names):
        config |= {
            "target_modules": sorted(ranks),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    return config
