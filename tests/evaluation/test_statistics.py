"""Estimates against closed forms and the libraries' own worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from evaluation.statistics import Estimate, PairedTest, mean, paired_test, share, share_of


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson (1927), equation 4, at 95 %."""
    z, p = 1.959963984540054, count / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_share_is_wilsons(case: tuple[int, int]) -> None:
    count, n = case
    estimate = share(count, n)
    low, high = wilson(count, n)
    assert estimate.value == count / n
    assert estimate.n == n
    assert estimate.low == pytest.approx(low, abs=1e-9)
    assert estimate.high == pytest.approx(high, abs=1e-9)


def test_a_known_share() -> None:
    estimate = share(8, 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_nothing_is_not_zero() -> None:
    for estimate in (share(0, 0), share_of([]), mean([], 0)):
        assert estimate.n == 0
        assert all(map(math.isnan, (estimate.value, estimate.low, estimate.high)))


def test_no_success_still_has_an_interval() -> None:
    assert share_of([False] * 20) == share(0, 20)
    assert share(0, 20).high > 0.1


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="3 in 2 rows"):
        share(3, 2)


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    estimate = mean(values.tolist(), seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_is_seeded() -> None:
    values = [math.sin(index) for index in range(50)]
    assert mean(values, 3) == mean(values, 3)
    assert mean(values, 3) != mean(values, 4)


def test_means_of_little() -> None:
    one = mean([0.3], 0)
    assert (one.value, one.n) == (0.3, 1)
    assert math.isnan(one.low)
    assert mean([0.5, 0.5, 0.5], 0) == Estimate(0.5, 0.5, 0.5, 3)
    assert math.isnan(mean([0.5, math.nan], 0).value)


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = (
        [(True, True)] * both
        + [(True, False)] * first
        + [(False, True)] * second
        + [(False, False)] * neither
    )
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(("first", "second"), [(3, 9), (0, 7), (5, 5), (12, 12)])
def test_few_discordant_rows_are_tested_exactly(first: int, second: int) -> None:
    result = paired_test(*outcomes(10, first, second, 20))
    assert result.p_value == pytest.approx(binomtest(first, first + second, 0.5).pvalue)
    assert result.difference == pytest.approx((first - second) / (30 + first + second))
    assert (result.only_first, result.only_second) == (first, second)


def test_many_discordant_rows_use_chi_squared() -> None:
    result = paired_test(*outcomes(40, 30, 12, 18))
    assert result.p_value == pytest.approx(chi2.sf((abs(30 - 12) - 1) ** 2 / 42, 1))


def test_equal_models_do_not_differ() -> None:
    assert paired_test(*outcomes(4, 0, 0, 6)) == PairedTest(0.0, 1.0, 0, 0, 10)


def test_paired_test_of_nothing() -> None:
    result = paired_test([], [])
    assert result.n == 0
    assert math.isnan(result.p_value)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_test([True], [True, False])
