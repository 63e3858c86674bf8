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
    norms = _points(run.rows, "train", "grad_norm")
    largest = run.config["optim"]["max_grad_norm"]
    above = sum(value > largest for _, value in norms)
    clipped = f"Clipped to {largest:g}: {above} of {len(norms)} logged values are above."
    plots = _pair_plots(run) if run.preferences else [_loss(run, "nats per token", scale="log")]
    plots += [
        Plot("Learning rate", "rate", _line(run, "learning_rate"), scale="zero"),
        Plot("Gradient norm", "before clipping", _line(run, "grad_norm"), clipped, scale="zero"),
    ]
    return [plot for plot in plots if plot.series]


def speed_plots(run: Run) -> list[Plot]:
    """Tokens and pairs per second, MFU and goodput, as far as they were measured."""
    share = "share of the devices' peak"
    said = {
        "Speed": "The first point includes compilation; evaluation and checkpoints are left out.",
        "Goodput": "Counted from the start of each run or resumption; compilation does not count.",
    }
    plots = [
        Plot(title, ylabel, _line(run, name), said.get(title, ""), scale="zero")
        for title, ylabel, name in (
            ("Speed", "target tokens per second", "target_tokens_per_s"),
            ("Pairs", "pairs per second", "pairs_per_s"),
            ("Model FLOPs utilization (MFU)", share, "mfu"),
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
    first, last = run.ends
    level = None
    if run.sigmoid:
        level = (math.log(2), "ln 2: no preference")
    start, final, moved = None, "", ""
    if "eval_logps/accuracies" in first:
        start = (first["eval_logps/accuracies"], "SFT log-likelihood, held-out")
        moved = "Held-out, first to last: " + "; ".join(
            f"{side} {first[name]:.1f} to {last[name]:.1f}"
            for side in ("chosen", "rejected")
            if (name := f"eval_logps/{side}") in first
        )
    if last is not first and "eval_rewards/accuracies" in last:
        final = (
            f" At the end, held-out: {100 * last['eval_rewards/accuracies']:.1f}%, and by "
            f"log-likelihood alone {100 * last['eval_logps/accuracies']:.1f}%."
        )
    untied = [row for row in run.rows if row.get("eval_rewards/ties") != 1]
    return [
        _loss(run, "DPO loss" if run.sigmoid else "preference loss", level),
        Plot(
            "How often the chosen answer wins",
            "share of pairs",
            _both(untied, "rewards/accuracies"),
            "By implicit reward; a tie counts as lost. The start, where every reward is 0, is "
            f"left out.{final}",
            start,
        ),
        Plot("Implicit rewards", "β · gain in log-probability", _sides(run.rows, "rewards")),
        Plot("Reward margin", "chosen minus rejected", _both(run.rows, "rewards/margins")),
        Plot("Log-probability of the answers", "nats", _sides(run.rows, "logps"), moved),
    ]


def _loss(
    run: Run, ylabel: str, level: tuple[float, str] | None = None, scale: str = "linear"
) -> Plot:
    first, last = run.ends
    caption = ""
    if "eval_loss" in first:
        caption = f"Held-out: {first['eval_loss']:.3f} at step {first['step']}"
        if last is not first:
            caption += f", {last['eval_loss']:.3f} at step {last['step']}"
    return Plot("Loss", ylabel, _both(run.rows, "loss"), caption, level, scale)


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
