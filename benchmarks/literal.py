"""The papers' formulas written out, where there is no authors' code; as in `ours`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.ours import Kinds, Step, matrices, pair_of
from defenses.fgsn.project import Matrix
from modeling.projections import Factored


def module(inputs: Inputs) -> Step:
    """NLSR: the singular value decomposition of X W^T, the cosine of the dense products."""
    a, b, a_t, b_t, x = pair_of(inputs)
    rank = max(1, round(a.shape[0] * 0.2))

    def step() -> None:
        z = x @ a.T
        for entering, w in ((x, a), (z, b)):
            v = torch.linalg.svd(entering @ w.T, full_matrices=False).Vh[:rank].T
            _ = (v @ v.T) @ w
        torch.nn.functional.cosine_similarity((b @ a).flatten(), (b_t @ a_t).flatten(), dim=0)

    return step


def fgsn(inputs: Inputs, kinds: Kinds) -> Step:
    """Eqs. 6 and 7: W_safe = D D^T / Dim formed, and multiplied with the whole matrix."""
    *sides, mask = matrices(inputs, kinds)

    def step() -> None:
        d, w = (_dense(side) for side in sides)
        torch.where(mask[:, None], (d @ d.T / d.norm()) @ w, w)

    return step


def _dense(matrix: Matrix) -> Tensor:
    return matrix.b @ matrix.a if isinstance(matrix, Factored) else matrix
