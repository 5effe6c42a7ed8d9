"""Estimates against closed forms and the libraries' own worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest, bootstrap, chi2, t, ttest_rel
from statsmodels.api import OLS
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

from evaluation.clusters import Clusters
from evaluation.statistics import (
    holm,
    kappa,
    mean,
    paired_mean,
    paired_test,
    share,
    share_of,
)


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
    for estimate in (share(0, 0), share_of([]), mean([])):
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
    estimate = mean(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_is_seeded() -> None:
    values = [math.sin(index) for index in range(50)]
    assert mean(values) == mean(values)


def test_means_of_little() -> None:
    one = mean([0.3])
    assert (one.value, one.n) == (0.3, 1)
    assert math.isnan(one.low)
    same = mean([0.5, 0.5, 0.5])
    assert (same.value, same.n) == (0.5, 3)
    assert math.isnan(same.low)
    assert math.isnan(same.high)
    assert math.isnan(mean([0.5, math.nan]).value)


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
    test = paired_test(*outcomes(4, 0, 0, 6))
    assert (test.difference, test.p_value, test.only_first, test.n) == (0.0, 1.0, 0, 10)
    assert (test.low, test.high) == (-share(0, 10).high, share(0, 10).high)


def test_paired_test_of_nothing() -> None:
    result = paired_test([], [])
    assert result.n == 0
    assert math.isnan(result.p_value)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="1 and 2 rows are no pairs"):
        paired_test([True], [True, False])


def crossed(seeds: int, prompts: int) -> Clusters:
    """Every seed's model is asked every prompt."""
    return Clusters(np.tile(np.arange(prompts), seeds), np.repeat(np.arange(seeds), prompts))


def drawn(
    rng: np.random.Generator, seeds: int, prompts: int, of_prompt: float, of_seed: float
) -> np.ndarray:
    """Outcomes (seeds, prompts) whose log-odds vary with the prompt and with the seed."""
    odds = of_prompt * rng.normal(size=(1, prompts)) + of_seed * rng.normal(size=(seeds, 1))
    return rng.random((seeds, prompts)) < expit(odds - 1)


def by_statsmodels(values: np.ndarray, clusters: Clusters) -> tuple[float, float, float]:
    """Two-way and one-way (seed, prompt) variances of the mean, from a regression on a constant."""
    fit = OLS(values, np.ones(values.size)).fit()
    return tuple(
        float(v.item()) for v in cov_cluster_2groups(fit, clusters.seeds, clusters.prompts)
    )


def test_clustered_variance_is_statsmodels() -> None:
    rng, clusters = np.random.default_rng(0), crossed(4, 60)
    values = (rng.normal(size=(1, 60)) + rng.normal(size=(4, 1)) + rng.normal(size=(4, 60))).ravel()
    both, of_seed, of_prompt = by_statsmodels(values, clusters)
    assert both > max(of_seed, of_prompt)
    half = t.isf(0.025, 3 * (both / of_seed) ** 2) * math.sqrt(both)
    estimate = mean(values, clusters)
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half, values.mean() + half)
    )
    test = paired_mean(values, np.zeros(values.size), clusters)
    assert test.test == "two-way clusters"
    statistic = abs(values.mean()) / math.sqrt(both)
    assert test.p_value == pytest.approx(2 * t.sf(statistic, 3 * (both / of_seed) ** 2))


def test_seeds_asked_different_prompts_are_one_way_clusters() -> None:
    rng, seeds = np.random.default_rng(1), np.repeat(np.arange(5), 40)
    values = rng.normal(size=200) + rng.normal(size=5)[seeds]
    clusters = Clusters(np.arange(200), seeds)
    both, of_seed, _ = by_statsmodels(values, clusters)
    assert both == pytest.approx(of_seed)
    estimate = mean(values, clusters)
    assert estimate.high - estimate.value == pytest.approx(t.isf(0.025, 4) * math.sqrt(both))


@given(st.integers(2, 4), st.integers(2, 12), st.integers(0, 10**6))
def test_several_seeds_are_never_surer_than_independent_rows(
    seeds: int, prompts: int, number: int
) -> None:
    outcomes = drawn(np.random.default_rng(number), seeds, prompts, 1.0, 1.0).ravel()
    pooled, estimate = share_of(outcomes), share_of(outcomes, crossed(seeds, prompts))
    assert estimate.value == pooled.value
    assert estimate.n == pooled.n
    assert 0 <= estimate.low <= pooled.low + 1e-9
    assert 1 >= estimate.high >= pooled.high - 1e-9


def test_one_seed_has_no_clusters() -> None:
    outcomes = np.arange(30) % 3 == 0
    assert share_of(outcomes, crossed(1, 30)) == share(10, 30)
    scores = outcomes.astype(float)
    assert mean(scores, crossed(1, 30)) == mean(scores)
    assert paired_test(outcomes, ~outcomes, crossed(1, 30)).test == "McNemar, chi-squared"


def test_seeds_that_are_copies_add_nothing() -> None:
    outcomes = np.tile(np.arange(200) % 5 == 0, 3)
    estimate = share_of(outcomes, crossed(3, 200))
    once = share(40, 200)
    assert (estimate.low, estimate.high) == pytest.approx((once.low, once.high), rel=0.01)


def test_no_success_in_any_seed_counts_each_prompt_once() -> None:
    for value, count in ((False, 0), (True, 50)):
        estimate = share_of([value] * 150, crossed(3, 50))
        once = share(count, 50)
        assert (estimate.low, estimate.high, estimate.n) == (once.low, once.high, 150)


def test_a_repair_that_mends_every_prompt_of_every_seed_is_tested_over_prompts() -> None:
    clusters, yes = crossed(3, 20), np.ones(60, dtype=bool)
    test = paired_test(~yes, yes, clusters)
    assert test.p_value == pytest.approx(2 / 2**20)
    assert (test.low, test.high) == (-1.0, pytest.approx(-share(20, 20).low))
    assert (test.only_second, test.n) == (60, 60)


def test_paired_interval_is_scipys_bootstrap() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random(300) < 0.3, rng.random(300) < 0.6
    test = paired_test(first, second)
    changes = first.astype(float) - second
    reference = bootstrap((changes,), np.mean, method="percentile", rng=rng).confidence_interval
    assert (test.low, test.high) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_weighted_mean_and_its_interval_are_scipys() -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(1, 40, size=150).astype(float)
    values = rng.normal(2, 1, size=150)
    estimate = mean(values, weights=weights)
    assert estimate.value == pytest.approx(np.average(values, weights=weights))
    reference = bootstrap(
        (values * weights, weights),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert (estimate.low, estimate.high) == pytest.approx(reference, abs=0.01)


def test_scores_are_compared_by_students_test() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(0.3, 1, size=80), rng.normal(0, 1, size=80)
    test = paired_mean(first, second)
    assert test.test == "t"
    assert test.p_value == pytest.approx(ttest_rel(first, second).pvalue)
    assert (test.low, test.high) == pytest.approx(
        (mean(first - second).low, mean(first - second).high)
    )
    assert test.only_first == (first > second).sum()
    unknown = paired_mean([0.1, math.nan], [0.2, 0.3])
    assert math.isnan(unknown.difference)
    assert math.isnan(unknown.p_value)
    assert unknown.n == 2


def test_kappa_is_statsmodels() -> None:
    first, second = outcomes(40, 9, 6, 45)
    result = cohens_kappa([[40, 9], [6, 45]])
    estimate = kappa(first, second)
    assert estimate.value == pytest.approx(result.kappa)
    assert (estimate.low, estimate.high) == pytest.approx((result.kappa_low, result.kappa_upp))


def test_agreement_by_chance_alone_is_no_agreement() -> None:
    assert math.isnan(kappa(*outcomes(0, 0, 0, 20)).value)
    assert kappa(*outcomes(0, 0, 5, 20)).value == pytest.approx(0.0)
    perfect = kappa(*outcomes(5, 0, 0, 20))
    assert perfect.value == 1.0
    assert math.isnan(perfect.low)
    assert kappa([], []).n == 0


def test_kappa_of_seeds_that_are_copies_is_as_wide_as_that_of_one() -> None:
    first, second = outcomes(40, 9, 6, 45)
    once, thrice = kappa(first, second), kappa(first * 3, second * 3, crossed(3, 100))
    assert thrice.value == pytest.approx(once.value)
    assert thrice.low == pytest.approx(once.low, abs=0.01)


def test_holms_worked_case() -> None:
    # Ordered 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; then no less than the one before.
    corrected = holm([0.01, 0.04, math.nan, 0.03, 0.005])
    assert corrected[:2] == pytest.approx([0.03, 0.06])
    assert math.isnan(corrected[2])
    assert corrected[3:] == pytest.approx([0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize("count", [1, 2, 9])
def test_holm_is_statsmodels(count: int) -> None:
    p_values = np.random.default_rng(count).random(count) ** 3
    with_gap = [math.nan, *p_values]
    assert holm(with_gap)[1:] == pytest.approx(multipletests(p_values, method="holm")[1])
    assert math.isnan(holm(with_gap)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "of_prompt", "of_seed", "pooled"),
    [(3, 2.0, 0.0, 0.9), (3, 2.0, 1.0, 0.5), (5, 2.0, 0.5, 0.75), (5, 0.0, 1.0, 0.4)],
)
def test_intervals_cover_where_pooled_rows_do_not(
    seeds: int, of_prompt: float, of_seed: float, pooled: float
) -> None:
    rng, clusters, runs = np.random.default_rng(0), crossed(seeds, 200), 1000
    truth = drawn(rng, 3000, 3000, of_prompt, of_seed).mean()
    hits = np.zeros(2)
    for _ in range(runs):
        outcomes = drawn(rng, seeds, 200, of_prompt, of_seed).ravel()
        estimates = share_of(outcomes, clusters), share_of(outcomes)
        hits += [estimate.low <= truth <= estimate.high for estimate in estimates]
    assert hits[0] / runs > 0.91
    assert hits[1] / runs < pooled
