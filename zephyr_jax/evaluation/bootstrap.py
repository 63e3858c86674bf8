"""Bootstrap intervals of means and of ratios of sums, over clusters: NumPy, seeded, float64.

Efron 1979; the percentile method. What is drawn anew are clusters (dialogues, or all pairs of one
prompt), since values inside one are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 1 << 22  # about 100 MB of work


class Interval(NamedTuple):
    """A number and the interval that 95% (or another level) of the resampled ones lie in."""

    value: float
    low: float
    high: float


class Ratio(NamedTuple):
    """What a number is made of: the sum of `above` divided by the sum of `below`, each `N`."""

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
    level: float = 0.95,
) -> dict[str, Interval]:
    """The interval of each ratio; all are resampled together.

    Args:
        ratios: by name, all of the same `N` units.
        clusters: which cluster each unit is in, `N` of any comparable values; None: each its own.
        samples: how many times the clusters are drawn anew, with replacement.
        seed: of the draws.
        level: share of the resampled values inside.

    Raises:
        ValueError: if there is no unit, or a setting is out of its range.
    """
    if not ratios:
        return {}
    units = np.stack([part for ratio in ratios.values() for part in ratio], axis=1, dtype=float)
    if not len(units):
        raise ValueError("there is nothing to take a mean of; give at least one unit")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples={samples} must be at least 1, and level={level} in (0, 1)")
    sums = units if clusters is None else cluster_sums(units, clusters)
    values = _divided(sums.sum(axis=0, keepdims=True))[0]
    drawn = _divided(_resampled(sums, samples, seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        name: Interval(float(value), float(a), float(b))
        for name, value, a, b in zip(ratios, values, low, high, strict=True)
    }


def cluster_sums(units: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The sums of the units of each cluster, `N M` to `C M`; clusters in the order of their names.

    Raises:
        ValueError: if there are not as many names as units.
    """
    if len(clusters) != len(units):
        raise ValueError(f"{len(clusters)} clusters are named for {len(units)} units; name each")
    names, which = np.unique(clusters, return_inverse=True)
    out = np.zeros((len(names), units.shape[1]))
    np.add.at(out, which, units)
    return out


def _divided(sums: np.ndarray) -> np.ndarray:
    return sums[:, ::2] / sums[:, 1::2]


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
