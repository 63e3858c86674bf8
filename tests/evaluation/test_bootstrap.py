"""Bootstrap intervals against closed forms."""

import numpy as np
import pytest

from zephyr_jax.evaluation.evaluate import Ratio, intervals, mean_of


def test_the_interval_of_a_ratio_is_that_of_the_delta_method():
    rng = np.random.default_rng(2)
    below = rng.integers(5, 200, 2000).astype(float)
    above = below * rng.gamma(4.0, 0.5, 2000)  # long texts vary more: a mean of ratios is narrower
    ratio = above.sum() / below.sum()
    half = 1.96 * (above - ratio * below).std() / below.mean() / np.sqrt(len(below))
    both = {"ratio": Ratio(above, below), "mean": mean_of(above / below)}
    result = intervals(both, samples=4000)
    assert result["ratio"]["value"] == pytest.approx(ratio, rel=1e-12)
    assert result["ratio"]["high"] - result["ratio"]["low"] == pytest.approx(2 * half, rel=0.06)
    assert result["mean"]["high"] - result["mean"]["low"] < 1.8 * half


def test_clusters_are_drawn_whole():
    values = np.random.default_rng(4).normal(size=50)
    alone = intervals({"x": mean_of(values)})["x"]
    # Each unit four times in one cluster says nothing new.
    copied = intervals({"x": mean_of(np.repeat(values, 4))}, np.repeat(np.arange(50), 4))
    assert copied["x"] == pytest.approx(alone, rel=1e-12)
    named = intervals({"x": mean_of([1.0, 2.0, 4.0])}, np.asarray(["b", "a", "b"]))
    assert named == intervals({"x": Ratio(np.asarray([2.0, 5.0]), np.asarray([1.0, 2.0]))})
