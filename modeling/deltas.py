"""Deltas: what alignment and fine-tuning added to each projection, algebra on it, and edits of it.

Alignment adds D = W_aligned - W_base and fine-tuning Delta = W_attacked - W_aligned.  Where both
models are LoRAs the difference stays a product b a of thin factors; where weights were trained it
is dense.  Nothing here forms a matrix of d_out x d_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from modeling.capture import rows_in_cache
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name
from modeling.lora import product_norm
from modeling.model_files import FLOATS, read_header
from modeling.projections import (
    Factored,
    Pairing,
    Projections,
    check_pairing,
    difference,
    open_pairing,
    open_projections,
    same_weights,
    scaled,
)
from modeling.rewrite import (
    EditCount,
    RowEdits,
    count_edits,
    write_adapter,
    write_full,
)
from modeling.stored import row_blocks

DeltaEdit = Callable[[str, Factored | Tensor], Factored | Tensor | None]

# Scalars of the widest temporary of a dense product: 16 MiB in float32.
_BLOCK = 1 << 22


class AlignedModels(Protocol):
    """The two models of which alignment made the second from the first."""

    @property
    def base(self) -> Checkpoint: ...

    @property
    def aligned(self) -> Checkpoint: ...


def alignment(models: AlignedModels, name: str, device: str | torch.device) -> Factored | Tensor:
    """D = W_aligned - W_base of the projection with this module path.

    Returns:
        Factored where the alignment is a LoRA on the base (rank 0 where it left this projection
        alone), else dense (d_out, d_in) float32.

    Raises:
        ModelError: There is no such projection, or the two have other shapes.
    """
    aligned = open_projections(models.aligned)
    if _is_added(models, aligned):
        return scaled(aligned, name, device)
    return difference(aligned, open_projections(models.base), name, device)


def alignment_rows(
    models: AlignedModels, name: str, device: str | torch.device
) -> Iterator[Tensor]:
    """D[rows] of one projection as of `alignment`, rows as in `Projections.blocks`."""
    aligned = open_projections(models.aligned)
    if _is_added(models, aligned):
        d = scaled(aligned, name, device)
        yield from (d.rows(rows) for rows in row_blocks(d.shape))
        return
    before = open_projections(models.base).blocks(name, device)
    for (_, after), (_, block) in zip(aligned.blocks(name, device), before, strict=True):
        yield after.sub_(block)


def _is_added(models: AlignedModels, aligned: Projections) -> bool:
    """Whether alignment is a LoRA on the very base."""
    plain = models.base.adapter is None and aligned.adapter is not None
    return plain and same_weights(models.base, models.aligned)


def fine_tuning(
    aligned: Checkpoint, attacked: Checkpoint, name: str, device: str | torch.device
) -> Factored | Tensor:
    """Delta = W_attacked - W_aligned of the projection with this module path.

    Returns:
        With both adapters on one base, a = [A_t; A_a] and b = [s_t B_t, -s_a B_a]; with an
        adapter on the aligned weights, its own A and s B; with full weights the dense difference
        (d_out, d_in) float32.

    Raises:
        ModelError: There is no such projection, or the models can't be compared.
    """
    return open_pairing(aligned, attacked).delta(name, device)


def safety_times(d: Factored | Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """D (D^T x): the product with D D^T of SafeLoRA and FGSN (eq. 6), without forming that.

    Factored: b (a a^T) (b^T x).  Dense: D (D^T x), columns of x in blocks, so that D^T x, which
    is (d_in, n), takes 16 MiB and not more than a weight.  Products are accumulated in the dtype
    of D, float32.

    Args:
        d: D of one projection.
        x: (d_out, n), e.g. a LoRA's B or a whole difference.
        out: (d_out, n) to write to; may be `x` itself, which spares a copy, but no part of D.

    Returns:
        (d_out, n): `out` where it is given.
    """
    result = torch.empty_like(x) if out is None else out
    if isinstance(d, Factored):
        return torch.matmul(d.b, (d.a @ d.a.mT) @ (d.b.mT @ x), out=result)
    step = max(1, _BLOCK // max(d.shape))
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        result[:, part] = d @ (d.mT @ x[:, part])
    return result


def frobenius(d: Factored | Tensor) -> float:
    """||D||_F, summed in float64; a product is never formed."""
    return float(product_norm(d.a, d.b)) if isinstance(d, Factored) else math.sqrt(inner(d, d))


def inner(x: Tensor, y: Tensor) -> float:
    """<x, y> of two matrices of one shape, summed in float64."""
    rows = rows_in_cache(x)
    sums = [
        torch.dot(p.double().flatten(), q.double().flatten())
        for p, q in zip(x.split(rows), y.split(rows), strict=True)
    ]
    return float(sum(sums))


def write_edited(
    aligned: Checkpoint,
    attacked: Checkpoint,
    out: Path,
    edit: DeltaEdit,
    *,
    names: Collection[str] | None = None,
) -> EditCount:
    """Writes the attacked model with Delta' = edit(name, Delta) in place of Delta.

    Delta = W_attacked - W_aligned of every projection that the fine-tuning touched, as
    `modeling.deltas.fine_tuning` gives it, on `device_name()`.  Adapters stay adapters, with the
    scale folded into B: s_a B_a A_a + b' a on the base where the attack resumed the aligned
    adapter, b' a where it trained a fresh one.  Full weights become a full folder in the
    checkpoint's dtype; scalars in which Delta' equals Delta keep the attacked value to the bit.

    Args:
        aligned: The aligned model.
        attacked: The fine-tuned model.
        out: The folder; must be missing or empty.
        edit: Gets a module path and Delta; returns Delta', or None to leave the projection as it
            is.  A factored edit keeps `a` and changes only b; a dense one may work in place.
        names: The projections that it is asked about; None: all that were touched.

    Raises:
        ModelError: The two models can't be compared, or what is written isn't finite.
    """
    pairing = open_pairing(aligned, attacked)
    check_pairing(pairing)
    wanted = tuple(name for name in pairing.touched if names is None or name in names)
    if pairing.kind != "full":
        return _write_adapter(pairing, out, edit, wanted)
    device = device_name()

    def rows(name: str) -> RowEdits | None:
        new = edit(name, pairing.delta(name, device))
        return None if new is None else _replaced(pairing, name, new, device)

    return write_full(pairing.attacked, out, wanted, rows)


def _replaced(
    pairing: Pairing, name: str, new: Factored | Tensor, device: str | torch.device
) -> RowEdits:
    """W_aligned + Delta' by rows; where Delta' equals Delta, the attacked value itself."""
    before = pairing.aligned.blocks(name, device)
    for (rows, attacked), (_, aligned) in zip(
        pairing.attacked.blocks(name, device), before, strict=True
    ):
        part = new.rows(rows) if isinstance(new, Factored) else new[rows]
        same = part == attacked - aligned
        yield rows, attacked, torch.where(same, attacked, aligned + part)


def _write_adapter(
    pairing: Pairing, out: Path, edit: DeltaEdit, wanted: Collection[str]
) -> EditCount:
    """The edited adapter: A_t (and A_a) as they are, and B of scale 1 on the attacked base."""
    attacked, device = pairing.attacked, device_name()
    assert attacked.adapter is not None
    changed = dict.fromkeys(pairing.touched, 0)

    def products() -> Iterator[tuple[str, Factored]]:
        for name in changed:
            product, rows = _edited(pairing, name, edit if name in wanted else None, device)
            changed[name] = rows * attacked.shapes[name][1]
            yield name, product

    bounds = {name: (sum(pairing.ranks(name)), *attacked.shapes[name]) for name in changed}
    write_adapter(attacked.adapter, out, _adapter_dtype(pairing), bounds, products())
    return count_edits(attacked, changed, replace(attacked.checkpoint, adapter=str(out)))


def _edited(
    pairing: Pairing, name: str, edit: DeltaEdit | None, device: str
) -> tuple[Factored, int]:
    """The product that the new adapter adds to its base, and how many rows of b differ.

    With an aligned adapter on the same base, b' a with a = [A_t; A_a] is what is added to the
    aligned model: on the base s_a B_a joins its last columns.  In b these hold -s_a B_a, so that
    an unedited row cancels exactly.
    """
    delta = pairing.delta(name, device)
    assert isinstance(delta, Factored)
    rank, _ = pairing.ranks(name)
    before = delta.b.clone()
    new = None if edit is None else edit(name, delta)
    if new is not None and not (isinstance(new, Factored) and torch.equal(new.a, delta.a)):
        raise ValueError(f"{name}: the edit of an adapter may change b alone")
    if new is None or torch.equal(new.b, before):
        return Factored(delta.a[:rank], before[:, :rank]), 0
    b = torch.cat([new.b[:, :rank], new.b[:, rank:] - before[:, rank:]], 1)
    return Factored(new.a, b), int((new.b != before).any(1).sum())


def _adapter_dtype(pairing: Pairing) -> str:
    """The adapters' common dtype; float32 where they differ or folding the scale would round."""
    merged = pairing.aligned.adapter if pairing.kind == "resumed" else None
    adapters = [a for a in (pairing.attacked.adapter, merged) if a is not None]
    headers = [read_header(adapter.weights)[0].values() for adapter in adapters]
    dtypes = {entry["dtype"] for header in headers for entry in header}
    scales = {shape.scale for adapter in adapters for shape in adapter.shapes.values()}
    if len(dtypes) > 1 or any(math.frexp(scale)[0] != 0.5 for scale in scales):
        return "float32"
    return FLOATS.get(dtypes.pop(), "float32")
