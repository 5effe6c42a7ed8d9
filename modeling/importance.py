"""Importance of weights for some data: Wanda's input norms (Sun et al. 2023) and top shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from modeling.architectures import LLAMA_LIKE
from modeling.capture import Batch, SquareSums, TokenRow, batches, consume_inputs
from modeling.checkpoint import Checkpoint
from modeling.loading import load_decoder, load_tokenizer
from modeling.projections import Projections, open_projections
from settings import DataError, ModelError

# "padded": all, and the padding up to the longest row of a batch.
TokenPositions = Literal["prompt", "answer", "all", "padded"]

# Scores that are counted at a time.
_BLOCK = 1 << 20


def input_norms(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    batch_size: int,
    positions: TokenPositions,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """||X_j||_2 of every input feature j of projections, Wanda's factor beside |W_ij|.

    One pass over the rows, batched by length, through the decoder alone (no logits); squares are
    summed in float64.

    Args:
        checkpoint: The model, loaded as it runs, with its adapter and its steering.
        rows: (prompt ids, answer ids); an answer may be empty.
        batch_size: Rows per forward pass.
        positions: Which tokens count; with "padded" the batches decide too.
        names: Module paths of the projections; None: all of the blocks.

    Returns:
        {module path: (d_in,) float64, on the CPU}, in the order of the blocks.

    Raises:
        DataError: No token is at these positions.
        ModelError: The model has no such projection.
    """
    source = open_projections(checkpoint)
    source.check(names or ())
    counted = {"prompt": slice(0, 1), "answer": slice(1, 2)}.get(positions, slice(2))
    if not any(any(row[counted]) for row in rows):
        raise DataError(
            f"no row has a token at positions={positions}; give rows that do, or positions=all"
        )
    model: Any = load_decoder(checkpoint)
    core = model.get_base_model() if checkpoint.adapter is not None else model
    modules = projection_modules(core, source, names)
    squares = SquareSums()

    data = counted_batches(checkpoint, rows, batch_size, str(model.device), positions)
    at = partial(counted_tokens, positions=positions)
    consume_inputs(core.base_model, modules, data, at, squares.add)
    return {name: squares.sums[name].sqrt().cpu() for name in modules}


def projection_modules(
    core: Any, source: Projections, names: Collection[str] | None
) -> dict[str, nn.Module]:
    """The modules of a model that projections of its weights are, in the order of the blocks.

    Args:
        core: The model, without what holds an adapter.
        source: Its weights.
        names: Module paths of projections; None: all of the blocks.

    Raises:
        ModelError: It has no such module.
    """
    wanted = [name for name in source.shapes if names is None or name in names]
    try:
        return {name: core.get_submodule(name) for name in wanted}
    except AttributeError as error:
        raise ModelError(
            f"not all projections of the weights are modules of the model that runs ({error}); "
            f"leave them out, or choose {LLAMA_LIKE}"
        ) from None


def counted_batches(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    size: int,
    device: str,
    positions: TokenPositions,
) -> list[Batch]:
    """Batches by length; where padding counts, in the rows' order, padded as the tokenizer does."""
    if positions != "padded":
        return batches(rows, size, device, by_length=True)
    pad_id: Any = load_tokenizer(checkpoint).pad_token_id
    return batches(rows, size, device, pad_id=pad_id)


def counted_tokens(batch: Batch, positions: TokenPositions) -> Tensor:
    """(rows, length) bool: the tokens that count."""
    if positions == "padded":
        return torch.ones_like(batch.answers)
    if positions == "answer":
        return batch.answers
    tokens = batch.attention_mask.bool()
    return tokens & ~batch.answers if positions == "prompt" else tokens


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2 (Wanda, Sun et al. 2023, arXiv 2306.11695), (d_out, d_in).

    In the dtype and on the device of W; the norms (d_in,) are those of `input_norms`.
    """
    return weight.abs().mul_(norms.to(weight))


Scope = Literal["tensor", "row"]


def top_share(scores: Tensor, share: float, scope: Scope) -> Tensor:
    """The round(share n) largest scores, of the whole tensor or of each row; see `largest`.

    n counts all scores (...,), or those of a row, which is the last dimension.

    Raises:
        ModelError: A score is NaN.
        ValueError: The share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    return largest(scores, round(share * count_scores(scores, scope)), scope)


def count_scores(scores: Tensor, scope: Scope) -> int:
    """How many scores the whole tensor has, or each of its rows (the last dimension)."""
    return scores.numel() if scope == "tensor" else scores.shape[-1]


def largest(scores: Tensor, k: int, scope: Scope) -> Tensor:
    """The k largest scores of the whole tensor or of each row; of equal ones the first indices.

    A threshold is found by selection, not by sorting.

    Returns:
        Bool mask of the scores' shape.

    Raises:
        ModelError: A score is NaN.
    """
    if bool(scores.isnan().any()):
        raise ModelError("a score is NaN; use weights and rows that give finite activations")
    n = count_scores(scores, scope)
    if k in (0, n):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    flat = scores.reshape(-1, n)
    threshold = kth_largest(flat, k)
    mask = flat > threshold
    ties = flat == threshold
    missing = torch.full_like(threshold, k, dtype=torch.long)
    for part in _columns(mask):
        missing -= part.sum(1, keepdim=True)
    _keep_first(ties, missing)
    return mask.logical_or_(ties).reshape(scores.shape)


def _keep_first(ties: Tensor, counts: Tensor) -> None:
    """Leaves the first `counts` (rows, 1) true values of each row of (rows, n), in place."""
    for part in _columns(ties):
        counted = part.cumsum(1, dtype=torch.int32)
        part &= counted <= counts
        counts = counts - counted[:, -1:]


def _columns(mask: Tensor) -> tuple[Tensor, ...]:
    """Views of blocks of columns: torch counts bools in a copy of 64-bit integers."""
    return mask.split(max(1, _BLOCK // len(mask)), dim=1)


def kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of (rows, n), by selection: (rows, 1)."""
    place = flat.shape[1] - k
    if flat.is_cuda:
        return flat.kthvalue(place + 1, dim=1, keepdim=True).values
    import numpy as np

    # Selection in numpy copies the scores once; torch's kthvalue also makes 64-bit indices.
    values = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
    largest = np.partition(values.numpy(), place, axis=1)[:, place, None].copy()
    return torch.from_numpy(largest).to(flat)


def pack_bits(mask: Tensor) -> Tensor:
    """The entries of a bool mask in order, (ceil(n / 8),) uint8 on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of this shape, on the CPU, that `pack_bits` made `packed` of."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).bool().reshape(tuple(shape))
