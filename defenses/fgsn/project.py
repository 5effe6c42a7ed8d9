"""The safety direction, and the projection of selected neurons onto it (paper: Eqs. 6 and 7).

D = W_aligned - W_base and X are (d_out, d_in), as full matrices or as factors b a.  D D^T, which
is d_out x d_out, is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.deltas import frobenius
from modeling.projections import Factored

EditKind = Literal["project", "zero", "blend"]
Norm = Literal["fro", "in", "out", "numel"]
Matrix = Factored | Tensor

ROWS = 256  # Rows that are multiplied at a time.


@dataclass(frozen=True, slots=True)
class Projection:
    """What becomes of a selected neuron: "project" (Eq. 7), "zero", or "blend" of it and Eq. 7's.

    `norm` is what Eq. 6 divides by, `blend_weight` the projection's share of a "blend".
    """

    edit: EditKind
    norm: Norm
    blend_weight: float = 1.0


def dim(direction: Matrix, norm: Norm) -> float:
    """Dim of Eq. 6, open in the paper: ||D||_F (as in SafeLoRA), d_in, d_out, d_in d_out."""
    d_out, d_in = direction.shape
    if norm == "fro":
        return frobenius(direction)
    return float({"in": d_in, "out": d_out, "numel": d_in * d_out}[norm])


def safety_product(direction: Matrix, x: Tensor, rows: Tensor) -> Tensor:
    """(D D^T X)[rows], W_safe X of Eq. 6 but for Dim, in the order that costs least.

    D is (d_out, d_in), X (d_out, n).  Beside the result (m, n), memory holds at most d_in x n or
    `ROWS` x d_out.
    """
    if isinstance(direction, Factored):
        inner = direction.a @ direction.a.mT
        return direction.b[rows] @ (inner @ (direction.b.mT @ x))
    d_out, d_in = direction.shape
    m, n = len(rows), x.shape[1]
    product = x.new_empty(m, n)
    right_first = (d_out + m) * d_in * n <= m * d_out * (d_in + n)
    right = direction.mT @ x if right_first else None
    for at in range(0, m, ROWS):
        left = direction[rows[at : at + ROWS]]
        part = product[at : at + ROWS]
        if right is None:
            torch.matmul(left @ direction.mT, x, out=part)
        else:
            torch.matmul(left, right, out=part)
    return product


def edited_rows(
    direction: Callable[[], Matrix], x: Tensor, rows: Tensor, plan: Projection
) -> Tensor | None:
    """Rows of Proj(X) = W_safe X (Eq. 7), of zeros, or of a blend of X and Proj(X).

    Returns:
        (m, n), or None where D = 0: there is no direction to project on.
    """
    if plan.edit == "zero":
        return x.new_zeros(len(rows), x.shape[1])
    d = direction()
    if frobenius(d) == 0:
        return None
    product = safety_product(d, x, rows).div_(dim(d, plan.norm))
    if plan.edit == "blend":
        product.mul_(plan.blend_weight).add_(x[rows], alpha=1 - plan.blend_weight)
    return product


def edit_neurons(
    direction: Callable[[], Matrix], matrix: Matrix, mask: Tensor, plan: Projection
) -> Matrix | None:
    """X <- (1 - M) * X + M * Proj(X), a new matrix; None where nothing is selected or D = 0.

    Of factors b a, whole rows are edited in b alone, so that the result has the same a.  M is
    (d_out,) bool for rows, (d_out, d_in) bool for single weights, which needs X as a full matrix.
    """
    x = matrix.b if isinstance(matrix, Factored) else matrix
    by_row = mask if mask.dim() == 1 else mask.any(1)
    rows = by_row.nonzero()[:, 0].to(x.device)
    new = edited_rows(direction, x, rows, plan) if len(rows) else None
    if new is None:
        return None
    if mask.dim() == 2:
        keep = ~mask.to(x.device)[rows]
        new[keep] = x[rows][keep]
    edited = x.clone()
    edited[rows] = new
    return Factored(matrix.a, edited) if isinstance(matrix, Factored) else edited


def masked_norm(matrix: Matrix, mask: Tensor) -> float:
    """||M * X||_F, without forming b a for whole rows; M as in `edit_neurons`."""
    if isinstance(matrix, Factored):
        return frobenius(Factored(matrix.a, matrix.b[mask.to(matrix.b.device)]))
    return math.sqrt(float(matrix[mask.to(matrix.device)].double().square().sum()))
