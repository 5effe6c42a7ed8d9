"""NLSR's masks: density, ties, order and storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.nlsr.masks import Rounding, above_threshold, cut, load_masks, save_masks, top_per_row
from modeling.checkpoint import Checkpoint
from modeling.importance import pack_bits, unpack_bits
from modeling.lora import open_adapter

sparsities = st.floats(0, 1)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(sparsities, st.integers(1, 9), st.integers(1, 40), st.sampled_from(["nearest", "down"]))
def test_every_row_has_the_given_density(
    sparsity: float, rows: int, columns: int, rounding: Rounding
) -> None:
    scores = torch.rand(2, rows, columns, generator=_generator())
    mask = top_per_row(scores, sparsity, rounding)
    kept = {"nearest": round(columns * (1 - sparsity)), "down": columns - int(columns * sparsity)}
    assert (mask.sum(-1) == kept[rounding]).all()
    kept, left = scores.where(mask, torch.inf), scores.where(~mask, -torch.inf)
    assert (kept.amin(-1) >= left.amax(-1)).all()


@given(sparsities, st.integers(1, 9), st.integers(1, 40))
def test_the_tensor_has_the_given_density_up_to_its_threshold(
    sparsity: float, rows: int, columns: int
) -> None:
    scores = torch.randperm(rows * columns, generator=_generator()).reshape(rows, columns) + 1.0
    mask = above_threshold(scores, sparsity, _generator())
    n, at = rows * columns, int(rows * columns * sparsity)
    assert int(mask.sum()) == (n if at == 0 else max(0, n - at - 1))
    assert at == 0 or (scores[mask] > scores.flatten().sort().values[min(at, n - 1)]).all()


def test_rows_are_cut_alone_and_the_tensor_as_a_whole() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])[None]
    by_row = cut(scores, 0.5, "row", "nearest", _generator())
    by_tensor = cut(scores, 0.5, "tensor", "nearest", _generator())
    assert by_row[0].tolist() == [[False, False, True, True]] * 2
    assert by_tensor[0].tolist() == [[False] * 4, [False, True, True, True]]


def test_ties_with_the_threshold_drop_out() -> None:
    scores = torch.tensor([[1.0, 2, 2, 2, 3]])
    assert above_threshold(scores, 0.5, _generator()).tolist() == [[False] * 4 + [True]]


def test_of_equal_scores_the_leftmost_win_per_row() -> None:
    scores = torch.ones(1, 2, 5)
    assert top_per_row(scores, 0.6, "nearest").tolist() == [[[True, True, False, False, False]] * 2]


def test_a_zero_threshold_draws_among_zeros() -> None:
    scores = torch.zeros(4, 25)
    scores[0, :10] = 1
    first, same, other = (above_threshold(scores, 0.5, _generator(seed)) for seed in (1, 1, 2))
    assert first[0, :10].all()
    assert int(first.sum()) == 50
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("topk", ["row", "tensor"])
def test_the_ends_are_everything_and_nothing(topk: str) -> None:
    scores = torch.rand(2, 3, 8, generator=_generator())
    assert cut(scores, 0.0, topk, "nearest", _generator()).all()
    assert not cut(scores, 1.0, topk, "down", _generator()).any()


def test_masks_come_back_from_disk(aligned: Checkpoint, tmp_path: Path) -> None:
    adapter = open_adapter(str(aligned.adapter), "aligned")
    generator = _generator()
    masks = {
        name: tuple(
            torch.rand(shape, generator=generator) < 0.3
            for shape in ((s.rank, s.d_in), (s.d_out, s.rank))
        )
        for name, s in adapter.shapes.items()
    }
    save_masks(masks, tmp_path / "masks.safetensors")
    for names in adapter.groups():
        a, b = load_masks(tmp_path / "masks.safetensors", adapter, names, "cpu")
        for j, name in enumerate(names):
            assert torch.equal(a[j], masks[name][0])
            assert torch.equal(b[j], masks[name][1])


def test_odd_sizes_are_packed_too() -> None:
    for columns in range(1, 20):
        mask = torch.rand(3, columns, generator=_generator(columns)) < 0.5
        packed = pack_bits(mask)
        assert packed.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack_bits(packed, (3, columns)), mask)
