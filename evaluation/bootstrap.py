"""Percentile bootstrap of means over rows."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000

_BATCH = 1000


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
