"""Bootstrap intervals of means and of ratios of sums, over clusters: NumPy, seeded, float64.

Efron 1979; the percentile method. Clusters are resampled (dialogues, or all pairs of one prompt),
since values inside one are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A number and the interval that 95% of the resampled ones lie in."""

    value: float
    low: float
    high: float


class Ratio(NamedTuple):
    """A number as the sum of `above` divided by the sum of `below`, each `N`."""

    above: np.ndarray
    below: np.ndarray


def mean_of(values: np.ndarray | Sequence[float]) -> Ratio:
    """The mean of `N` values as a ratio of sums."""
    array = np.asarray(values, np.float64)
    return Ratio(array, np.ones_like(array))


def intervals(
    ratios: Mapping[str, Ratio],
    clusters: np.ndarray | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each ratio; all are resampled together.

    Args:
        ratios: by name, all of the same `N` units.
        clusters: the cluster of each unit, `N` of any comparable values; None: each its own.
        samples: how many times the clusters are resampled, with replacement.
        seed: random seed.
    """
    sums = np.stack([part for ratio in ratios.values() for part in ratio], axis=1, dtype=float)
    if clusters is not None:
        names, which = np.unique(clusters, return_inverse=True)
        units, sums = sums, np.zeros((len(names), sums.shape[1]))
        np.add.at(sums, which, units)
    rng, n = np.random.default_rng(seed), len(sums)
    drawn = np.empty((samples, sums.shape[1]))
    for sample in drawn:
        sample[:] = np.bincount(rng.integers(0, n, n), minlength=n) @ sums
    totals = sums.sum(axis=0)
    values = totals[::2] / totals[1::2]
    low, high = np.quantile(drawn[:, ::2] / drawn[:, 1::2], [0.025, 0.975], axis=0)
    return {
        name: Interval(float(value), float(a), float(b))
        for name, value, a, b in zip(ratios, values, low, high, strict=True)
    }
