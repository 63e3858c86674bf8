"""Which curves are drawn of a run, from the rows of its `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zephyr_jax.evaluation.pairs import PairTable, pair_columns
from zephyr_jax.reports.plots import Histogram, Plot, Series
from zephyr_jax.reports.run_folder import Run

Rows = Sequence[dict[str, Any]]


def learning_plots(run: Run) -> list[Plot]:
    """Loss, learning rate and gradient norm, and what a preference run measures of its pairs."""
    plots = [Plot("Loss", "nats per token, log scale", _both(run.rows, "loss"), scale="log")]
    if run.beta:
        plots = _pair_plots(run)
    largest = run.config["optim"]["max_grad_norm"]
    plots += [
        Plot("Learning rate", "rate", _line(run, "learning_rate"), scale="zero"),
        Plot("Gradient norm", f"before clipping to {largest:g}", _line(run, "grad_norm")),
    ]
    return [plot for plot in plots if plot.series]


def speed_plots(run: Run) -> list[Plot]:
    """Tokens and pairs per second, MFU and goodput, as far as they were measured."""
    plots = [
        Plot(title, ylabel, _line(run, name), scale="zero")
        for title, ylabel, name in (
            ("Speed", "target tokens per second", "target_tokens_per_s"),
            ("Pairs", "pairs per second", "pairs_per_s"),
            ("Model FLOPs utilization (MFU)", "share of the devices' peak", "mfu"),
            ("Goodput", "share of wall time inside steps", "goodput"),
        )
    ]
    return [plot for plot in plots if plot.series]


def reward_plots(table: PairTable, beta: float) -> list[Histogram]:
    """The distributions of the implicit rewards of both answers, and of their margin."""
    columns = pair_columns(table, beta)
    rewards = {side: columns[f"rewards/{side}"] for side in ("chosen", "rejected")}
    margins = {"margin": columns["rewards/margins"]}
    unit, note = "beta times nats", f"{len(table.ids):,} held-out pairs, last evaluation."
    return [
        Histogram("Implicit rewards", unit, "answers", rewards, note),
        Histogram("Reward margin, chosen minus rejected", unit, "pairs", margins, note),
    ]


def _pair_plots(run: Run) -> list[Plot]:
    level, start = None, None
    if run.config["dpo"].get("loss", "sigmoid") == "sigmoid":
        level = (math.log(2), "ln 2: no preference")
    if run.evals and "eval_logps/accuracies" in run.evals[0]:
        start = (run.evals[0]["eval_logps/accuracies"], "SFT log-likelihood, held-out")
    untied = [row for row in run.rows if row.get("eval_rewards/ties") != 1]
    caption = (
        "By implicit reward; a tie counts as lost. The start, where all rewards are 0, is out."
    )
    return [
        Plot("Loss", "preference loss", _both(run.rows, "loss"), level=level),
        Plot(
            "How often the chosen answer wins",
            "share of pairs",
            _both(untied, "rewards/accuracies"),
            caption,
            start,
        ),
        Plot("Implicit rewards", "β · gain in log-probability", _sides(run.rows, "rewards")),
        Plot("Reward margin", "chosen minus rejected", _both(run.rows, "rewards/margins")),
        Plot("Log-probability of the answers", "nats", _sides(run.rows, "logps")),
    ]


def _line(run: Run, name: str) -> list[Series]:
    points = _points(run.rows, "train", name)
    return [Series("", points, "train")] if points else []  # the title says what it is


def _both(rows: Rows, name: str, label: str = "", color: str = "") -> list[Series]:
    """A metric of the training steps and of the held-out set."""
    series = [
        Series(f"{label}train", _points(rows, "train", name), color or "train"),
        Series(f"{label}held-out", _points(rows, "eval", f"eval_{name}"), color or "heldout", True),
    ]
    return [each for each in series if each.points]


def _sides(rows: Rows, family: str) -> list[Series]:
    return [
        series
        for side in ("chosen", "rejected")
        for series in _both(rows, f"{family}/{side}", f"{side}, ", side)
    ]


def _points(rows: Rows, split: str, name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric, where it was written."""
    return [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
