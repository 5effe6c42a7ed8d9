"""FGSN's projection: Eqs. 6 and 7 against the dense formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.fgsn.project import (
    Matrix,
    Norm,
    Projection,
    dim,
    edit_neurons,
    masked_norm,
    safety_product,
)
from modeling.deltas import safety_times
from modeling.projections import Factored
from tests.defenses.tensor_sizes import LargestNew


def _matrix(d_out: int, d_in: int, rank: int | None, seed: int) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(d_out, d_in, generator=generator)
    return Factored(
        torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    )


def _dense(matrix: Matrix) -> Tensor:
    return (
        (matrix.b.double() @ matrix.a.double()) if isinstance(matrix, Factored) else matrix.double()
    )


def _literal(direction: Matrix, x: Tensor, norm: Norm) -> Tensor:
    """W_safe X with W_safe = D D^T / Dim formed (Eqs. 6 and 7)."""
    d = _dense(direction)
    d_out, d_in = d.shape
    sizes = {"fro": d.norm(), "in": d_in, "out": d_out, "numel": d_out * d_in}
    return (d @ d.mT / sizes[norm]) @ x.double()


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1)
    )


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(
    SHAPES,
    st.none() | st.integers(1, 3),
    st.sampled_from(["fro", "in", "out", "numel"]),
    st.integers(0, 2**9 - 1),
    st.integers(0, 99),
)
def test_the_projection_equals_the_dense_formula(
    sizes: tuple[int, int, int | None], rank: int | None, norm: Norm, bits: int, seed: int
) -> None:
    d_out, d_in, d_rank = sizes
    direction, delta = _matrix(d_out, d_in, d_rank, seed), _matrix(d_out, d_in, rank, seed + 1)
    mask = torch.tensor([bool(bits >> at & 1) for at in range(d_out)])
    edited = edit_neurons(lambda: direction, delta, mask, Projection("project", norm))
    before = _dense(delta)
    if not mask.any():
        assert edited is None
        return
    assert edited is not None
    expected = torch.where(mask[:, None], _literal(direction, before, norm), before)
    _close(_dense(edited), expected)


@pytest.mark.parametrize("m", [3, 40, 600])
@pytest.mark.parametrize("sizes", [(600, 40, 40), (600, 40, 6), (40, 700, 700), (40, 700, 6)])
def test_the_product_doesnt_depend_on_its_order(sizes: tuple[int, int, int], m: int) -> None:
    d_out, d_in, n = sizes
    direction, x = torch.randn(d_out, d_in), torch.randn(d_out, n)
    rows = torch.randperm(d_out)[:m]
    _close(safety_product(direction, x, rows), safety_times(direction, x)[rows].double())


def test_single_weights_are_projected_alone() -> None:
    direction, delta = _matrix(6, 5, None, 0), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.3
    edited = edit_neurons(lambda: direction, delta, mask, Projection("project", "fro"))
    assert isinstance(edited, Tensor)
    _close(edited, torch.where(mask, _literal(direction, delta, "fro"), delta.double()))
    assert torch.equal(edited[~mask], delta[~mask])


def test_of_a_product_only_selected_rows_of_b_change() -> None:
    direction, delta = _matrix(8, 5, 2, 0), _matrix(8, 5, 3, 1)
    mask = torch.tensor([True, False] * 4)
    edited = edit_neurons(lambda: direction, delta, mask, Projection("project", "fro"))
    assert isinstance(edited, Factored)
    assert isinstance(delta, Factored)
    assert torch.equal(edited.a, delta.a)
    assert torch.equal((edited.b != delta.b).any(1), mask)


def test_zero_and_blend() -> None:
    direction, delta = _matrix(6, 5, 2, 0), _matrix(6, 5, 3, 1)
    mask = torch.tensor([True, True, False, True, False, False])
    plans = (_zero(), Projection("blend", "fro", 0.3), Projection("project", "fro"))
    zero, blend, projected = (edit_neurons(lambda: direction, delta, mask, p) for p in plans)
    assert projected is not None
    assert zero is not None
    assert blend is not None
    assert not _dense(zero)[mask].any()
    _close(_dense(blend), 0.7 * _dense(delta) + 0.3 * _dense(projected))


def test_zeros_need_no_direction() -> None:
    def missing() -> Matrix:
        raise AssertionError("D was read")

    edited = edit_neurons(missing, torch.ones(3, 2), torch.tensor([1, 0, 0]).bool(), _zero())
    assert isinstance(edited, Tensor)
    assert edited.tolist() == [[0, 0], [1, 1], [1, 1]]


def _zero() -> Projection:
    return Projection("zero", "fro")


@pytest.mark.parametrize("norm", ["fro", "in", "out", "numel"])
def test_without_a_direction_nothing_is_projected(norm: Norm) -> None:
    empty = Factored(torch.zeros(0, 4), torch.zeros(3, 0))
    for direction in (empty, torch.zeros(3, 4)):
        mask = torch.ones(3, dtype=torch.bool)
        plan = Projection("project", norm)
        assert edit_neurons(lambda d=direction: d, torch.ones(3, 4), mask, plan) is None


def test_dim() -> None:
    direction = _matrix(6, 4, 2, 0)
    assert [dim(direction, norm) for norm in ("in", "out", "numel")] == [4, 6, 24]
    assert dim(direction, "fro") == pytest.approx(float(_dense(direction).norm()))
    assert dim(_dense(direction).float(), "fro") == pytest.approx(dim(direction, "fro"))


def test_the_norm_of_the_selected_neurons() -> None:
    delta = _matrix(6, 5, 3, 1)
    rows = torch.tensor([True, True, False, True, False, False])
    single = torch.rand(6, 5) < 0.5
    assert masked_norm(delta, rows) == pytest.approx(float(_dense(delta)[rows].norm()))
    assert masked_norm(_dense(delta), single) == pytest.approx(float(_dense(delta)[single].norm()))


@pytest.mark.parametrize("d_rank", [None, 4])
@pytest.mark.parametrize("rank", [None, 4])
def test_nothing_of_the_size_of_d_d_t_is_formed(d_rank: int | None, rank: int | None) -> None:
    d_out, d_in = 2000, 64
    direction, delta = _matrix(d_out, d_in, d_rank, 0), _matrix(d_out, d_in, rank, 1)
    mask = torch.arange(d_out) % 3 == 0
    with LargestNew() as largest:
        edited = edit_neurons(lambda: direction, delta, mask, Projection("project", "fro"))
    assert edited is not None
    assert 0 < largest.numel <= max(d_out * d_in, 256 * d_out) < d_out * d_out
