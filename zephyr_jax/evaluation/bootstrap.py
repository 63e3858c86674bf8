"""Bootstrap intervals of means and of ratios of sums, over clusters: NumPy, seeded, float64.

Efron 1979; the percentile method. Clusters are resampled (dialogues, or all pairs of one prompt),
since values inside one are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 1 << 22  # about 100 MB of work


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
        seed: of the draws.

    Raises:
        ValueError: if there is no unit, or not one cluster for each.
    """
    if not ratios:
        return {}
    units = np.stack([part for ratio in ratios.values() for part in ratio], axis=1, dtype=float)
    if not len(units):
        raise ValueError("there is nothing to take a mean of; give at least one unit")
    sums = units if clusters is None else cluster_sums(units, clusters)
    totals, drawn = sums.sum(axis=0), _resampled(sums, samples, seed)
    values = totals[::2] / totals[1::2]
    low, high = np.quantile(drawn[:, ::2] / drawn[:, 1::2], [0.025, 0.975], axis=0)
    return {
        name: Interval(float(value), float(a), float(b))
        for name, value, a, b in zip(ratios, values, low, high, strict=True)
    }


def cluster_sums(units: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The sums of the units of each cluster, `N M` to `C M`, in the order of the clusters."""
    if len(clusters) != len(units):
        raise ValueError(f"{len(clusters)} clusters for {len(units)} units; give each unit its own")
    names, which = np.unique(clusters, return_inverse=True)
    out = np.zeros((len(names), units.shape[1]))
    np.add.at(out, which, units)
    return out


def _resampled(sums: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums over as many clusters as there are, drawn with replacement: `C M` to `samples M`."""
    rng, n = np.random.default_rng(seed), len(sums)
    size = max(1, _DRAWS_AT_ONCE // n)
    out = np.empty((samples, sums.shape[1]))
    for start in range(0, samples, size):
        count = min(size, samples - start)
        drawn = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        out[start : start + count] = times @ sums
    return out
