"""Estimates with their intervals, and paired tests between two models on the same prompts.

Rows of several seeds are a crossed design: the models of all seeds were asked the same prompts, so
that neither rows of one seed nor rows of one prompt are independent. Variances are then two-way
cluster-robust (Cameron, Gelbach & Miller 2011) and quantiles those of Student's t, whose degrees of
freedom come from the number of seeds. `docs/statistics.md` has the formulas, their sources and how
often the intervals cover.

Everywhere `clusters` holds the prompt and the seed of each row, None for one seed, and `weights`
what each row counts, e.g. its tokens, None if all count the same. Bootstraps have one fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.clusters import Clusters, Floats, clustered_variance

EXACT_BELOW = 25

_LEVEL = 0.95
_RESAMPLES, _BATCH, _SEED = 10_000, 1000, 0


def _number(value: Any) -> Any:
    return math.nan if value is None else value


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

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Estimate:
        """An estimate as a record holds it, in which None is no number."""
        return cls(**{name: _number(figures[name]) for name in ("value", "low", "high", "n")})

    def shown(self, unit: str = "%") -> tuple[str, str, str]:
        """Value, interval and n as text: ("87.0", "82.7–90.3", "n=300").

        Args:
            unit: "%" for a share; else the figures are shown as they are, with two digits.

        Returns:
            "-" in the value's place where there is none; "" in the interval's, and in n's where
            there were no rows.
        """
        if self.n == 0:
            return "-", "", ""
        scale, digits = (100, 1) if unit == "%" else (1, 2)
        value, low, high = (
            f"{scale * end:.{digits}f}" for end in (self.value, self.low, self.high)
        )
        if math.isnan(self.value):
            return "-", "", f"n={self.n}"
        return value, "" if math.isnan(self.low) else f"{low}–{high}", f"n={self.n}"


@dataclass(frozen=True, slots=True)
class PairedTest:
    """How two models differ on the same rows: the difference, its 95 % interval, and a test of it.

    Attributes:
        difference: Share (or mean) of the first minus that of the second; NaN for no rows.
        p_value: Two-sided; NaN for no rows.
        only_first: Rows where only the first says yes; of scores, where the first's is higher.
        only_second: Rows where only the second says yes; of scores, where the second's is higher.
        n: How many rows were compared.
        low: Lower end of the difference's interval; NaN where it can't be said.
        high: Upper end of the difference's interval; NaN where it can't be said.
        test: What gave the p-value: "McNemar, exact", "McNemar, chi-squared", "t", or
            "two-way clusters" for rows of several seeds; "" for no rows.
        p_holm: The p-value after Holm's correction across the family of tests that it belongs to;
            NaN until then.
    """

    difference: float
    p_value: float
    only_first: int
    only_second: int
    n: int
    low: float = math.nan
    high: float = math.nan
    test: str = ""
    p_holm: float = math.nan

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> PairedTest:
        """A test as a record holds it, in which None is no number."""
        return cls(**{name: _number(value) for name, value in figures.items()})

    def shown(self) -> tuple[str, str, str]:
        """Difference, interval and p-value as text: ("-85.0", "[-89.0, -81.0]", "p < 0.001").

        In points.

        Returns:
            Holm's p-value where it is known, with ", Holm" behind it. "-" in the difference's place
            where no rows were compared; "" in the interval's where it can't be said.
        """
        if self.n == 0:
            return "-", "", ""
        low, high = 100 * self.low, 100 * self.high
        interval = "" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
        corrected = not math.isnan(self.p_holm)
        p_value = self.p_holm if corrected else self.p_value
        written = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
        return f"{100 * self.difference:+.1f}", interval, written + (", Holm" if corrected else "")


_NO_PAIRS = PairedTest(math.nan, math.nan, 0, 0, 0)


def share(count: int, n: int) -> Estimate:
    """`count` of `n` independent rows with Wilson's interval; no rows give NaN and n = 0.

    Raises:
        ValueError: `count` is negative or above `n`.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a share of {count} in {n} rows does not exist")
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return Estimate(count / n, *_wilson(count / n, n, math.inf), n)


def share_of(
    outcomes: Sequence[bool] | NDArray[np.bool_], clusters: Clusters | None = None
) -> Estimate:
    """The share of true outcomes, with Wilson's interval.

    Over several seeds Wilson's n is the effective sample size p (1 - p) / V of the two-way
    cluster-robust variance V (Korn & Graubard 1998; of Wilson's interval: Franco et al. 2019), and
    its quantile Student's. Where all outcomes are the same V says nothing; n is then the number of
    distinct prompts.
    """
    data = np.asarray(outcomes, dtype=bool)
    count, n = int(data.sum()), data.size
    if clusters is None or clusters.distinct_seeds < 2:
        return share(count, n)
    value = count / n
    if count in (0, n):
        return Estimate(value, *_wilson(value, clusters.distinct_prompts, math.inf), n)
    variance, freedom = clustered_variance(data - value, clusters)
    return Estimate(value, *_wilson(value, value * (1 - value) / variance, freedom), n)


def mean(
    values: Sequence[float] | Floats,
    clusters: Clusters | None = None,
    weights: Sequence[float] | Floats | None = None,
) -> Estimate:
    """The mean with its interval: a percentile bootstrap over rows, or Student's over seeds.

    One value, or values that are all the same, have no interval; no values have no mean either. A
    value that isn't finite makes mean and interval NaN: leaving rows out is the caller's decision.
    """
    data = np.asarray(values, dtype=float)
    n = data.size
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if not (n and np.isfinite(data).all() and weight.sum() > 0):
        return Estimate(math.nan, math.nan, math.nan, n)
    value = float(weight @ data / weight.sum())
    if np.ptp(data) == 0:
        return Estimate(value, math.nan, math.nan, n)
    if clusters is None or clusters.distinct_seeds < 2:
        return Estimate(value, *_bootstrapped(data, weight), n)
    variance, freedom = clustered_variance(weight * (data - value) / weight.mean(), clusters)
    half = _quantile(freedom) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, n)


def paired_test(
    first: Sequence[bool] | NDArray[np.bool_],
    second: Sequence[bool] | NDArray[np.bool_],
    clusters: Clusters | None = None,
) -> PairedTest:
    """Compares two models' yes/no outcomes on the same rows.

    One seed: McNemar's test, exact below 25 discordant rows, and a bootstrap interval over the
    rows. Several: a t-test and interval of the mean difference by the two-way cluster-robust
    variance. Where all differences are the same neither has a variance; the interval then is as
    wide as Wilson's for no success among the prompts, and McNemar's test counts each prompt once.

    Raises:
        ValueError: The two differ in length.
    """
    one, other = (np.asarray(outcomes, dtype=bool) for outcomes in (first, second))
    changes = _differences(one.astype(float), other.astype(float))
    n = changes.size
    if n == 0:
        return _NO_PAIRS
    ups, downs, value = int((changes > 0).sum()), int((changes < 0).sum()), float(changes.mean())
    if np.ptp(changes) == 0:
        prompts = n if clusters is None else clusters.distinct_prompts
        p_value, test = _mcnemar(prompts * (value > 0), prompts * (value < 0))
        margin = share(0, prompts).high
        ends = value - margin, value + margin
    elif clusters is None or clusters.distinct_seeds < 2:
        p_value, test = _mcnemar(ups, downs)
        kinds = [ups / n, downs / n, (n - ups - downs) / n]
        drawn = np.random.default_rng(_SEED).multinomial(n, kinds, size=_RESAMPLES)
        ends = _percentiles((drawn[:, 0] - drawn[:, 1]) / n)
    else:
        p_value, ends = _student(value, *clustered_variance(changes - value, clusters))
        test = "two-way clusters"
    low, high = max(-1.0, ends[0]), min(1.0, ends[1])
    return PairedTest(value, p_value, ups, downs, n, low, high, test)


def paired_mean(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    clusters: Clusters | None = None,
    weights: Sequence[float] | Floats | None = None,
) -> PairedTest:
    """Compares two models' scores on the same rows: a t-test, and the interval of `mean`.

    A score that isn't finite makes the result NaN.

    Raises:
        ValueError: The two differ in length.
    """
    one, other = (np.asarray(scores, dtype=float) for scores in (first, second))
    changes = _differences(one, other)
    estimate = mean(changes, clusters, weights)
    n = estimate.n
    if n == 0:
        return _NO_PAIRS
    ups, downs, value = int((one > other).sum()), int((one < other).sum()), estimate.value
    p_value, test = math.nan, ""
    if n > 1 and not math.isnan(value):
        weight = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
        influence = weight * (changes - value) / weight.mean()
        if np.ptp(changes) == 0:
            prompts = n if clusters is None else clusters.distinct_prompts
            p_value, test = _mcnemar(prompts * (value > 0), prompts * (value < 0))
        elif clusters is None or clusters.distinct_seeds < 2:
            variance = float(influence @ influence) / (n * (n - 1))
            p_value, test = _student(value, variance, n - 1)[0], "t"
        else:
            p_value, test = (
                _student(value, *clustered_variance(influence, clusters))[0],
                "two-way clusters",
            )
    return PairedTest(value, p_value, ups, downs, n, estimate.low, estimate.high, test)


def kappa(
    first: Sequence[bool] | NDArray[np.bool_],
    second: Sequence[bool] | NDArray[np.bool_],
    clusters: Clusters | None = None,
) -> Estimate:
    """Cohen's kappa (1960) of two judges' yes/no verdicts on the same rows.

    The interval is the large-sample one (Fleiss, Cohen & Everitt 1969), over several seeds with the
    two-way cluster-robust variance; it can't be said where the judges always agree, or where one of
    them says the same of all rows. Kappa is NaN
    where both judges say the same of all rows: chance alone agrees as well.

    Raises:
        ValueError: The two differ in length.
    """
    one, other = (np.asarray(verdicts, dtype=float) for verdicts in (first, second))
    agree = 1 - np.abs(_differences(one, other))
    n = agree.size
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, q, observed = float(one.mean()), float(other.mean()), float(agree.mean())
    chance = p * q + (1 - p) * (1 - q)
    if chance == 1:
        return Estimate(math.nan, math.nan, math.nan, n)
    value = (observed - chance) / (1 - chance)
    # The first-order change of kappa by each row, which Fleiss' variance is the mean square of.
    by_chance = (2 * q - 1) * (one - p) + (2 * p - 1) * (other - q)
    influence = (agree - observed - (1 - value) * by_chance) / (1 - chance)
    variance, freedom = clustered_variance(influence, clusters)
    if agree.all() or {0.0, 1.0} & {p, q}:
        return Estimate(value, math.nan, math.nan, n)
    half = _quantile(freedom) * math.sqrt(variance)
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's (1979) correction for their number; a NaN is no test and stays."""
    given = np.asarray(p_values, dtype=float)
    # By hand, since statsmodels collects garbage at every call: a tenth of a second, or more. NaN
    # sorts to the end, behind all tests.
    order, count = np.argsort(given), int((~np.isnan(given)).sum())
    times = np.maximum(count - np.arange(given.size), 1)
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(np.maximum.accumulate(given[order] * times), 1.0)
    return corrected.tolist()


def _differences(one: Floats, other: Floats) -> Floats:
    if one.shape != other.shape:
        raise ValueError(f"{one.size} and {other.size} rows are no pairs")
    return one - other


def _bootstrapped(data: Floats, weight: Floats) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over its rows."""
    columns = np.stack([weight * data, weight], axis=1)
    means = []
    for counts in _resamples(data.size):
        sums = counts.astype(float) @ columns
        # A resample of rows without weight has no mean.
        sums = sums[sums[:, 1] > 0]
        means.append(sums[:, 0] / sums[:, 1])
    return _percentiles(np.concatenate(means))


@lru_cache(maxsize=2)
def _resamples(n: int) -> list[NDArray[np.uint8]]:
    """How often each of `n` rows is drawn in each resample, in batches of (resamples, n).

    All means over sets of the same size use the same resamples; drawing them takes most of the
    time.
    """
    generator = np.random.default_rng(_SEED)
    offsets = n * np.arange(_BATCH)[:, None]
    batches = []
    for _ in range(_RESAMPLES // _BATCH):
        drawn = (generator.integers(n, size=(_BATCH, n)) + offsets).ravel()
        counts = np.bincount(drawn, minlength=_BATCH * n).reshape(_BATCH, n)
        batches.append(counts.astype(np.uint8))
    return batches


def _percentiles(drawn: Floats) -> tuple[float, float]:
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


@lru_cache(maxsize=4096)
def _wilson(value: float, n: float, freedom: float) -> tuple[float, float]:
    """Wilson's interval (statsmodels) for `n` rows, which may be an effective number of them."""
    from scipy.special import ndtr
    from statsmodels.stats.proportion import proportion_confint

    alpha = 2 * float(ndtr(-_quantile(freedom)))
    low, high = proportion_confint(value * n, n, alpha=alpha, method="wilson")
    # At 0 and 1 the library's rounding may leave the value just outside its own interval.
    return min(float(low), value), max(float(high), value)


def _quantile(freedom: float) -> float:
    """Student's quantile of the level, two-sided; infinite degrees of freedom are the normal's."""
    from scipy.special import ndtri, stdtrit

    tail = (1 - _LEVEL) / 2
    return -float(ndtri(tail) if math.isinf(freedom) else stdtrit(freedom, tail))


def _student(value: float, variance: float, freedom: float) -> tuple[float, tuple[float, float]]:
    """Two-sided p-value of a t-test against zero, and the interval's ends."""
    from scipy.special import ndtr, stdtr

    error = math.sqrt(variance)
    half, statistic = _quantile(freedom) * error, -abs(value) / error
    tail = ndtr(statistic) if math.isinf(freedom) else stdtr(freedom, statistic)
    return 2 * float(tail), (value - half, value + half)


def _mcnemar(only_first: int, only_second: int) -> tuple[float, str]:
    """McNemar's p-value (statsmodels), and which of its forms gave it."""
    from statsmodels.stats.contingency_tables import mcnemar

    exact = only_first + only_second < EXACT_BELOW
    # The test doesn't depend on the rows on which both say the same.
    result: Any = mcnemar([[0, only_first], [only_second, 0]], exact=exact)
    return float(result.pvalue), "McNemar, exact" if exact else "McNemar, chi-squared"
