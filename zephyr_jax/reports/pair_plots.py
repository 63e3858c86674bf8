"""Distributions of implicit rewards and margins over the pairs of a set."""

from __future__ import annotations

import numpy as np

from zephyr_jax.evaluation.pairs import PairTable, pair_columns
from zephyr_jax.reports.plots import Bars, Histogram

_BINS = 40


def reward_plots(table: PairTable, beta: float) -> list[Histogram]:
    """The implicit rewards of both answers, and their margin."""
    columns = pair_columns(table, beta)
    rewards = {name: columns[f"rewards/{name}"] for name in ("chosen", "rejected")}
    margin = "Reward margin, chosen minus rejected", "beta times nats"
    return [
        spread("rewards", "Implicit rewards", "beta times nats", "answers", **rewards),
        spread("margins", *margin, "pairs", margin=columns["rewards/margins"]),
    ]


def spread(name: str, title: str, xlabel: str, ylabel: str, **values: np.ndarray) -> Histogram:
    """A histogram of one or two arrays over common bins, with their means below."""
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), _BINS)
    known = ("chosen", "rejected")
    bars = [
        Bars(label, np.histogram(x, edges)[0].tolist(), label if label in known else "heldout")
        for label, x in values.items()
    ]
    said = ", ".join(f"{label} {float(np.mean(x)):.4g}" for label, x in values.items())
    mark = (0.0, "no difference") if edges[0] < 0 < edges[-1] else None
    return Histogram(name, title, xlabel, ylabel, edges.tolist(), bars, f"Mean: {said}.", mark)
