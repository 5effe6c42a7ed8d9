"""Clusters of rows by prompt and seed, and the variance of an estimate over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """What rows have in common: the prompt that was asked, and the seed of the asked model.

    Attributes:
        prompts: (n,) number of each row's prompt, from 0 without gaps.
        seeds: (n,) number of each row's seed, from 0 without gaps.
    """

    prompts: NDArray[np.integer[Any]]
    seeds: NDArray[np.integer[Any]]

    @property
    def distinct_prompts(self) -> int:
        return int(self.prompts.max(initial=-1)) + 1

    @property
    def distinct_seeds(self) -> int:
        return int(self.seeds.max(initial=-1)) + 1


def clustered_variance(influence: Floats, clusters: Clusters | None) -> tuple[float, float]:
    """Variance of an estimate from what each row adds to it, and its degrees of freedom.

    Over several seeds V = V_seed + V_prompt - V_both (Cameron, Gelbach & Miller 2011), no less than
    either one-way variance and that of independent rows; the degrees of freedom are Satterthwaite's
    (G - 1) (V / V_seed)^2, since V_seed alone comes from few units, the G seeds.

    Args:
        influence: (n,) the rows' influences, which sum to zero; the estimate's error is their mean.
        clusters: Prompt and seed of each row; None for one seed.
    """
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
    sums = np.bincount(clusters, weights=influence)
    if sums.size < 2:
        return 0.0
    return float(sums @ sums) / influence.size**2 * sums.size / (sums.size - 1)
