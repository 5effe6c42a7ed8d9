"""Estimates with their intervals, and the paired test between two models on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or mean with its 95 % interval.

    Attributes:
        value: The point estimate; NaN where there is nothing to estimate from.
        low: Lower end of the interval; NaN where it can't be said.
        high: Upper end of the interval; NaN where it can't be said.
        n: How many rows it was computed from.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class PairedTest:
    """McNemar's test of two models' yes/no outcomes on the same rows.

    Attributes:
        difference: Share of the first minus share of the second; NaN for no rows.
        p_value: Two-sided; NaN for no rows.
        only_first: Rows where only the first says yes.
        only_second: Rows where only the second says yes.
        n: How many rows were compared.
    """

    difference: float
    p_value: float
    only_first: int
    only_second: int
    n: int


def share(count: int, n: int) -> Estimate:
    """`count` of `n` with Wilson's interval (statsmodels); no rows give NaN and n = 0.

    Raises:
        ValueError: `count` is negative or above `n`.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a share of {count} in {n} rows does not exist")
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, n, alpha=1 - LEVEL, method="wilson")
    value = count / n
    # At 0 and 1 the library's rounding may leave the value just outside its own interval.
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def share_of(outcomes: Sequence[bool]) -> Estimate:
    """The share of true outcomes, with Wilson's interval."""
    return share(sum(map(bool, outcomes)), len(outcomes))


def mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean with a percentile bootstrap interval (scipy), drawn with `seed`.

    One value has no interval; no values have no mean either. A NaN among the values makes value
    and interval NaN: leaving rows out is the caller's decision.
    """
    import numpy as np
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    if data.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(data.mean())
    if data.size == 1 or math.isnan(value):
        return Estimate(value, math.nan, math.nan, data.size)
    interval = bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), data.size)


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """McNemar's test (statsmodels): exact below 25 discordant rows, else chi-squared.

    Args:
        first: Outcomes of one model, one per row.
        second: Outcomes of the other model on the same rows, in the same order.

    Raises:
        ValueError: The two differ in length.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    n = len(pairs)
    if n == 0:
        return PairedTest(math.nan, math.nan, 0, 0, 0)
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    exact = only_first + only_second < 25
    result = mcnemar([[both, only_first], [only_second, neither]], exact=exact)
    return PairedTest(
        (only_first - only_second) / n, float(result.pvalue), only_first, only_second, n
    )
