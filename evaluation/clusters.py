"""How far an estimate errs: its variance over clusters of rows, and the bootstrap over rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000

_BATCH = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """The numbers of each row's prompt and of its model's seed, both (n,) from 0 without gaps."""

    prompts: NDArray[np.integer[Any]]
    seeds: NDArray[np.integer[Any]]

    @property
    def distinct_prompts(self) -> int:
        """How many prompts there are."""
        return int(self.prompts.max(initial=-1)) + 1

    @property
    def distinct_seeds(self) -> int:
        """How many seeds there are."""
        return int(self.seeds.max(initial=-1)) + 1


def clustered_variance(influence: Floats, clusters: Clusters | None) -> tuple[float, float]:
    """Variance of an estimate from what each row adds to it, and its degrees of freedom.

    Over several seeds V = V_seed + V_prompt - V_both (Cameron, Gelbach & Miller 2011), no less than
    either one-way variance and that of independent rows; the degrees of freedom are Satterthwaite's
    (G - 1) (V / V_seed)^2, since V_seed alone comes from few units, the G seeds.

    The influences sum to zero, and the estimate's error is their mean.
    """
    import numpy as np

    n = influence.size
    independent = float(influence @ influence) / n**2
    if clusters is None or clusters.distinct_seeds < 2:
        return independent, math.inf
    prompts, seeds = clusters.prompts, clusters.seeds
    pairs = np.unique(seeds * clusters.distinct_prompts + prompts, return_inverse=True)[1]
    by_seed, by_prompt, by_both = (_one_way(influence, of) for of in (seeds, prompts, pairs))
    variance = max(by_seed + by_prompt - by_both, by_seed, by_prompt, independent)
    if by_seed <= 0:
        return variance, math.inf
    return variance, (clusters.distinct_seeds - 1) * (variance / by_seed) ** 2


def _one_way(influence: Floats, clusters: NDArray[np.integer[Any]]) -> float:
    """One-way cluster-robust variance of a mean, with the correction G / (G - 1)."""
    import numpy as np

    sums = np.bincount(clusters, weights=influence)
    if sums.size < 2:
        return 0.0
    return float(sums @ sums) / influence.size**2 * sums.size / (sums.size - 1)


def bootstrap_interval(data: Floats, weight: Floats, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean over its rows."""
    import numpy as np

    columns = np.stack([weight * data, weight], axis=1)
    means = []
    for counts in _resamples(data.size, seed):
        sums = counts.astype(float) @ columns
        # A resample of rows without weight has no mean.
        sums = sums[sums[:, 1] > 0]
        means.append(sums[:, 0] / sums[:, 1])
    return percentiles(np.concatenate(means))


@lru_cache(maxsize=2)
def _resamples(n: int, seed: int) -> list[NDArray[np.uint8]]:
    """How often each of `n` rows is drawn in each resample, in batches of (resamples, n).

    All means over sets of the same size use the same resamples; drawing them takes most of the
    time.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    offsets = n * np.arange(_BATCH)[:, None]
    batches = []
    for _ in range(RESAMPLES // _BATCH):
        drawn = (generator.integers(n, size=(_BATCH, n)) + offsets).ravel()
        counts = np.bincount(drawn, minlength=_BATCH * n).reshape(_BATCH, n)
        batches.append(counts.astype(np.uint8))
    return batches


def percentiles(drawn: Floats) -> tuple[float, float]:
    """The ends of the interval that holds the level's share of what was drawn."""
    import numpy as np

    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
