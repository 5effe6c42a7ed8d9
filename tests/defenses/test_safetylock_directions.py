"""SafetyLock's directions, splits and choice of heads, against the formulas written out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.safetylock.directions import mass_mean, overlap, scores, split, top


def _outputs(seed: int = 0) -> torch.Tensor:
    """(2 layers, 3 heads, 10 rows, 4 tokens, 6): head (0, 1) separates, head (1, 2) a little."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, 10, 4, 6, generator=generator)
    a[0, 1, 0::2] += 6.0
    a[1, 2, 0::2] += 0.8
    return a


def test_the_direction_is_the_difference_of_means() -> None:
    a = _outputs().double().numpy()
    found = mass_mean(_outputs(), "float64")
    for layer in range(2):
        for head in range(3):
            safe = a[layer, head, 0::2].reshape(-1, 6)
            unsafe = a[layer, head, 1::2].reshape(-1, 6)
            u = safe.mean(0) - unsafe.mean(0)
            u /= np.linalg.norm(u)
            sigma = (np.concatenate([safe, unsafe]) @ u).std(ddof=0)
            np.testing.assert_allclose(found.u[layer, head], u, atol=1e-6)
            assert float(found.sigma[layer, head]) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-6), ("float32", 1e-5), ("float16", 6e-3)]
)
def test_precision_costs_what_the_literature_says(
    precision: Literal["float64", "float32", "float16"], tolerance: float
) -> None:
    exact, rough = mass_mean(_outputs(), "float64"), mass_mean(_outputs(), precision)
    torch.testing.assert_close(rough.sigma, exact.sigma, rtol=tolerance, atol=0)
    if precision == "float16":
        assert not torch.equal(rough.sigma, exact.sigma)


def test_equal_means_have_no_direction() -> None:
    a = _outputs()
    a[0, 0, 1::2] = a[0, 0, 0::2]
    found = mass_mean(a, "float32")
    assert not found.u[0, 0].any()
    assert float(found.sigma[0, 0]) == 0.0


@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.05, 0.95), st.integers(0, 99))
def test_no_pair_lies_on_both_sides(pairs: int, tokens: int, share: float, seed: int) -> None:
    held = split(2 * pairs, tokens, share, "pairs", seed)
    by_pair = held.reshape(pairs, 2 * tokens)
    assert torch.equal(by_pair.all(1), by_pair.any(1))
    assert int(by_pair.all(1).sum()) == max(1, round(share * pairs))
    assert torch.equal(held, split(2 * pairs, tokens, share, "pairs", seed))


def test_the_official_split_draws_tokens() -> None:
    held = split(40, 5, 0.4, "tokens", 0)
    assert int(held.sum()) == 80
    by_pair = held.reshape(20, 10)
    assert not torch.equal(by_pair.all(1), by_pair.any(1))


@pytest.mark.parametrize("rule", ["validation", "train_validation_mean", "log_loss"])
def test_the_head_that_separates_is_chosen(
    rule: Literal["validation", "train_validation_mean", "log_loss"],
) -> None:
    score, accuracy = scores(_outputs(), split(10, 4, 0.4, "pairs", 0), rule, 1.0)
    assert top(score, 1) == [(0, 1)]
    assert float(accuracy[0, 1]) == 1.0


def test_ties_go_to_the_lower_layer_then_head() -> None:
    score = torch.tensor([[0.5, 1.0, 0.5], [1.0, 0.5, 1.0]])
    assert top(score, 5) == [(0, 1), (1, 0), (1, 2), (0, 0), (0, 2)]


def test_overlap_is_jaccards() -> None:
    assert overlap([[(0, 0), (0, 1)], [(0, 0), (1, 1)]]) == pytest.approx(1 / 3)
    assert overlap([[(0, 0)]]) == 1.0
