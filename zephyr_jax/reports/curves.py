"""Which curves are drawn of runs, from the rows of their `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zephyr_jax.reports.plots import Plot, Series


def sft_plots(rows: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss and rate of an SFT run, from the rows of its `metrics.jsonl`."""
    return [_loss("sft", rows), _rate("sft", rows)]


def dpo_plots(rows: Sequence[dict[str, Any]], sigmoid: bool = True) -> list[Plot]:
    """Loss, accuracy, margins, rewards, log-probabilities and rate of a preference run.

    Args:
        rows: of the run's metrics.
        sigmoid: whether the loss is DPO's, whose value says something where nothing is preferred.
    """
    first, last = _ends(rows)
    start = first.get("eval_logps/accuracies")
    moved = [
        f"{side} {first[name]:.1f} to {last[name]:.1f} ({last[name] - first[name]:+.1f})".replace(
            "-", "\N{MINUS SIGN}"
        )
        for side in ("chosen", "rejected")
        if (name := f"eval_logps/{side}") in first
    ]
    final = ""
    if last is not first and "eval_rewards/accuracies" in last:
        final = (
            f" At the end, held-out: {100 * last['eval_rewards/accuracies']:.1f}%, and by "
            f"log-likelihood alone {100 * last['eval_logps/accuracies']:.1f}%."
        )
    return [
        _loss("dpo", rows, level=(0.693147, "ln 2: no preference") if sigmoid else None),
        Plot(
            "dpo-accuracy",
            "How often the chosen answer wins",
            "share of pairs",
            _split(_not_tied(rows), "rewards/accuracies"),
            "By implicit reward; a tie counts as lost. The start, where every reward is 0, is "
            f"left out.{final}",
            None if start is None else (start, "SFT log-likelihood, held-out"),
        ),
        Plot(
            "dpo-rewards",
            "Implicit rewards",
            "β · gain in log-probability",
            _sides(rows, "rewards"),
        ),
        Plot(
            "dpo-margins",
            "Reward margin",
            "chosen minus rejected",
            _split(rows, "rewards/margins"),
        ),
        Plot(
            "dpo-logps",
            "Log-probability of the answers",
            "nats per answer",
            _sides(rows, "logps"),
            f"Held-out, first to last: {'; '.join(moved)}." if moved else "",
        ),
        _rate("dpo", rows),
    ]


def step_plots(rows: Sequence[dict[str, Any]], max_norm: float) -> list[Plot]:
    """Learning rate and gradient norm, which is cut to `max_norm`."""
    rate, norm = (points_of(rows, "train", name) for name in ("learning_rate", "grad_norm"))
    cut = sum(value > max_norm for _, value in norm)
    said = f"Cut to {max_norm:g}: {cut} of {len(norm)} logged values are above." if norm else ""
    return [
        Plot("learning-rate", "Learning rate", "rate", _line(rate), scale="zero"),
        Plot("grad-norm", "Gradient norm", "norm before the cut", _line(norm), said, scale="zero"),
    ]


def speed_plots(rows: Sequence[dict[str, Any]]) -> list[Plot]:
    """Tokens and pairs per second, MFU and goodput, so far as they were measured."""
    share = "share of the devices' peak"
    other = [
        Plot("pairs-rate", "Pairs", "pairs per second", _named(rows, "pairs_per_s"), scale="zero"),
        Plot("mfu", "Model FLOPs utilization (MFU)", share, _named(rows, "mfu"), scale="zero"),
        Plot(
            "goodput",
            "Goodput",
            "share of wall time inside steps",
            _named(rows, "goodput"),
            "Of each start of the run from its beginning on; its compilation is not productive.",
            scale="zero",
        ),
    ]
    return [_rate("run", rows), *other]


def _named(rows: Sequence[dict[str, Any]], name: str) -> list[Series]:
    return _line(points_of(rows, "train", name))


def _line(points: list[tuple[float, float]]) -> list[Series]:
    return [Series("", points, "train")] if points else []  # the title says what it is


def _loss(stage: str, rows: Sequence[dict[str, Any]], level=None) -> Plot:
    first, last = _ends(rows)
    caption = ""
    if "eval_loss" in first:
        caption = f"Held-out: {first['eval_loss']:.3f} at step {first['step']}"
        if last is not first:
            caption += f", {last['eval_loss']:.3f} at step {last['step']}"
        caption += "."
    series = _split(rows, "loss")
    if stage == "dpo":
        ylabel = "DPO loss" if level else "preference loss"
        return Plot("dpo-loss", "Loss", ylabel, series, caption, level)
    ylabel = "nats per token, log scale"
    return Plot("sft-loss", "Loss", ylabel, series, caption, scale="log")


def _rate(stage: str, rows: Sequence[dict[str, Any]]) -> Plot:
    return Plot(
        f"{stage}-rate",
        "Speed",
        "tokens with loss per second",
        _named(rows, "target_tokens_per_s"),
        "The first point includes compilation; evaluation and checkpoints are left out.",
        scale="zero",
    )


def _split(rows: Sequence[dict[str, Any]], name: str) -> list[Series]:
    both = [
        Series("train", points_of(rows, "train", name), "train"),
        Series("held-out", points_of(rows, "eval", f"eval_{name}"), "heldout", heldout=True),
    ]
    return [series for series in both if series.points]


def _sides(rows: Sequence[dict[str, Any]], family: str) -> list[Series]:
    lines = []
    for side in ("chosen", "rejected"):
        name = f"{family}/{side}"
        lines += [
            Series(f"{side}, train", points_of(rows, "train", name), side),
            Series(
                f"{side}, held-out", points_of(rows, "eval", f"eval_{name}"), side, heldout=True
            ),
        ]
    return [series for series in lines if series.points]


def points_of(rows: Sequence[dict[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric, where it was written."""
    return [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]


def _not_tied(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("eval_rewards/ties") != 1]


def _ends(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last evaluation; empty where there is none yet."""
    evals = [row for row in rows if row["split"] == "eval"] or [{}]
    return evals[0], evals[-1]
