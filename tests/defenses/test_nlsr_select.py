"""NLSR's choice of modules: probabilities, signs and draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.nlsr.patch import below, draw, masked_similarity, patch_probabilities

similarities = st.lists(st.floats(-1, 1), min_size=1, max_size=40)
shares = st.floats(0, 1)


def test_linear_probabilities_are_the_papers() -> None:
    got = patch_probabilities([0.9, 0.1, 0.5, 0.7], 0.5, 0.4, "least_similar", "linear").tolist()
    keep = [0.3 + 0.4 * rank / 4 for rank in (4, 1, 2, 3)]
    assert got == pytest.approx([1 - p for p in keep])


def test_official_probabilities_favour_the_most_similar() -> None:
    got = patch_probabilities([0.9, 0.1, 0.5], 0.5, 0.4, "most_similar", "min_max").tolist()
    assert got == pytest.approx([0.7, 0.3, 0.5])


@given(similarities, shares, shares, st.sampled_from(["linear", "min_max"]))
def test_orders_are_each_others_opposite(
    values: list[float], prune_rate: float, delta: float, rule: str
) -> None:
    least, most = (
        patch_probabilities(values, prune_rate, delta, order, rule).tolist()
        for order in ("least_similar", "most_similar")
    )
    assert all(0 <= p <= 1 for p in least + most)
    assert sorted(least) == pytest.approx(sorted(most))
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            if left < right:
                assert least[i] >= least[j]
                assert most[i] <= most[j]


@given(st.floats(-1, 1), shares)
def test_a_single_module_has_a_probability(similarity: float, prune_rate: float) -> None:
    got = patch_probabilities([similarity], prune_rate, 0.4, "least_similar", "min_max").tolist()
    assert got == pytest.approx([prune_rate])


@pytest.mark.parametrize(
    ("order", "rule", "lowest", "highest"),
    [
        ("least_similar", "linear", 0.68, 0.32),
        ("least_similar", "min_max", 0.68, 0.32),
        ("most_similar", "min_max", 0.32, 0.68),
        ("most_similar", "linear", 0.32, 0.68),
    ],
)
def test_frequencies_by_decile_follow_the_order(
    order: str, rule: str, lowest: float, highest: float
) -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    chances = patch_probabilities(values, 0.5, 0.4, order, rule)
    counts = torch.zeros(200)
    for seed in range(500):
        counts += torch.tensor(draw(chances, seed)).float()
    ranked = counts[torch.tensor(values).argsort()].reshape(10, 20).mean(1) / 500
    assert ranked[0] == pytest.approx(lowest, abs=0.02)
    assert ranked[-1] == pytest.approx(highest, abs=0.02)
    expected = torch.linspace(lowest, highest, 10)
    torch.testing.assert_close(ranked, expected, atol=0.02, rtol=0)


def test_draws_are_determined_by_their_seed() -> None:
    chances = torch.full((64,), 0.5)
    assert draw(chances, 42) == draw(chances, 42)
    assert draw(chances, 42) != draw(chances, 43)
    assert draw(torch.tensor([0.0, 1.0]), 1) == [False, True]


def test_the_threshold_takes_what_lies_below() -> None:
    assert below([0.59, 0.6, 0.61], 0.6) == [True, False, False]


def test_similarity_is_the_dense_masked_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3, 11), "b": (5, 7, 3)}
    e, t = ([torch.randn(*s, generator=generator) for s in shapes.values()] for _ in range(2))
    masks = [torch.rand(*s, generator=generator) < 0.5 for s in shapes.values()]
    dense = [((b * masks[1]) @ (a * masks[0])).flatten(1) for a, b in (e, t)]
    expected = torch.nn.functional.cosine_similarity(*dense, dim=1)
    got = masked_similarity((e[0], e[1]), (t[0], t[1]), (masks[0], masks[1]))
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)
    unmasked = torch.nn.functional.cosine_similarity(*[(b @ a).flatten(1) for a, b in (e, t)])
    assert not torch.allclose(expected, unmasked, atol=0.01)
