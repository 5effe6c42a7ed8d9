"""How safety-critical each scalar of lora_A and lora_B is (paper: step 2, and Table 5).

The larger a score, the more safety-critical its neuron.  See README, "Identification".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RankRule = Literal["kept", "dropped"]


def projection_rank(rank_rule: RankRule, sparsity: float, rank: int, shape: tuple[int, int]) -> int:
    """How many singular vectors the projection of a LoRA matrix W of that shape keeps.

    "kept" is the paper's r* = r (1 - P_SR), rounded to the nearest; "dropped" is the official
    code's int(min(W.shape) * P_SR).  Both are at least 1 and at most min(W.shape).
    """
    smallest = min(shape)
    count = round(rank * (1 - sparsity)) if rank_rule == "kept" else int(smallest * sparsity)
    return min(max(count, 1), smallest)


def project(a: Tensor, b: Tensor, gram: Tensor, rank_a: int, rank_b: int) -> tuple[Tensor, Tensor]:
    """What = V V^T W for A and B, V the top right singular vectors of X W^T (paper: step 2).

    Both X W^T are read off one r x r matrix.  For A they are Z = X A^T, the tokens that enter B,
    whose right singular vectors are the eigenvectors of the Gram matrix Z^T Z.  For B = Q R
    (reduced QR), Z B^T = (Z R^T) Q^T has the right singular vectors Q U, U the eigenvectors of
    R Z^T Z R^T.  So nothing of tokens x d_out or d_out x d_out is formed, and the decomposition
    is exact where `svd_lowrank` is iterative.

    `gram` is Z^T Z over the answer tokens, (m, r, r), float64.

    Returns:
        What of A (m, r, d_in) and of B (m, d_out, r), in float64.
    """
    a, b = a.double(), b.double()
    vectors = _top_eigenvectors(gram, rank_a)
    projected_a = vectors @ (vectors.mT @ a)
    q, r = torch.linalg.qr(b)
    vectors = _top_eigenvectors(r @ gram @ r.mT, rank_b)
    projected_b = q @ (vectors @ (vectors.mT @ r))
    return projected_a, projected_b


def wanda(weight: Tensor, squares: Tensor, samples: int) -> Tensor:
    """|W| * sqrt(mean over samples of ||x_col||^2) of A or B, in float64 (Wanda in Table 5).

    `squares` (in,) are summed over the answer tokens of `samples` rows of W's inputs.
    """
    return weight.detach().double().abs_().mul_((squares / samples).sqrt())


def _top_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors (m, k, count) of the largest eigenvalues of (m, k, k).

    Directions that no token has (eigenvalue 0 up to rounding) are zeroed: any basis of them
    would do for a singular value decomposition, and an arbitrary one would be noise here.
    """
    values, vectors = torch.linalg.eigh(symmetric)
    values, vectors = values[..., -count:], vectors[..., -count:]
    size = symmetric.shape[-1]
    floor = values[..., -1:].clamp(min=0) * size * torch.finfo(values.dtype).eps
    return vectors * (values > floor).unsqueeze(-2)
