"""Curves and histograms as inline SVG in the colours of the page, so that they follow its mode."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

# Colours that nothing else has; in the SVG each becomes the page's variable of that name.
_MARKS = {
    name: f"#0a0b{number:02x}"
    for number, name in enumerate(("ink", "soft", "line", "train", "heldout", "chosen", "rejected"))
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: it takes the page's font and can be searched
    "svg.hashsalt": "zephyr_jax",  # the same run gives the same page
    "font.size": 9.5,
    "text.color": _MARKS["ink"],
    "axes.edgecolor": _MARKS["soft"],
    "axes.labelcolor": _MARKS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.color": _MARKS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": _MARKS["soft"],
    "ytick.color": _MARKS["soft"],
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot: points (step, value); held-out lines are dashed and have dots."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str  # "train", "heldout", "chosen" or "rejected"
    heldout: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot with its words: a level is a dotted horizontal line, (value, what it is)."""

    name: str
    title: str
    ylabel: str
    series: Sequence[Series]
    caption: str = ""
    level: tuple[float, str] | None = None
    scale: str = "linear"  # of the values: "linear", "zero" (linear from 0 on) or "log"


@dataclasses.dataclass(frozen=True)
class Bars:
    """One distribution of a histogram: a count for every bin, drawn as steps."""

    label: str
    counts: Sequence[float]
    colour: str  # as of a Series


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Distributions over the same bins, which lie between the edges; a mark is a dotted line."""

    name: str
    title: str
    xlabel: str
    ylabel: str
    edges: Sequence[float]
    bars: Sequence[Bars]
    caption: str = ""
    mark: tuple[float, str] | None = None


def sft_plots(rows: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss and rate of an SFT run, from the rows of its `metrics.jsonl`."""
    return [_loss("sft", rows), _rate("sft", rows)]


def dpo_plots(rows: Sequence[dict[str, Any]]) -> list[Plot]:
    """Loss, accuracy, margins, rewards, log-probabilities and rate of a DPO run."""
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
    if last is not first:
        final = (
            f" At the end, held-out: {100 * last['eval_rewards/accuracies']:.1f}%, and by "
            f"log-likelihood alone {100 * last['eval_logps/accuracies']:.1f}%."
        )
    return [
        _loss("dpo", rows, level=(0.693147, "ln 2: no preference")),
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


def render(plot: Plot | Histogram) -> str:
    """The plot as an `<svg>` element for an HTML page: no script, no reference outside it."""
    import matplotlib  # takes a second, and only this needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.75), layout="constrained")
        axes = figure.add_subplot()
        if isinstance(plot, Histogram):
            _draw_bars(axes, plot)
        else:
            _draw_lines(axes, plot)
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
        svg = io.BytesIO()
        nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nobody)
    by = plot.xlabel if isinstance(plot, Histogram) else "step"
    return _inline(svg.getvalue().decode(), plot.name, f"{plot.title}, by {by}")


def _draw_lines(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for series in plot.series:
        style = {"linestyle": (0, (4, 1.5)), "marker": "o"} if series.heldout else {}
        if len(series.points) == 1:
            style["marker"] = "o"
        steps, values = zip(*series.points, strict=True)
        axes.plot(steps, values, color=_MARKS[series.colour], label=series.label, **style)
    if plot.level:
        value, label = plot.level
        axes.axhline(value, color=_MARKS["soft"], linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.ylabel)
    last = max([step for series in plot.series for step, _ in series.points] + [1])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.locator_params(axis="x", integer=True, nbins=8)
    if plot.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.locator_params(axis="y", nbins=6)
        axes.set_ylim(bottom=0 if plot.scale == "zero" else None)


def _draw_bars(axes: Any, plot: Histogram) -> None:
    for bars in plot.bars:
        colour = _MARKS[bars.colour]
        axes.stairs(bars.counts, plot.edges, color=colour, label=bars.label, linewidth=1.6)
    if plot.mark:
        value, label = plot.mark
        axes.axvline(value, color=_MARKS["soft"], linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", nbins=6)


def _inline(svg: str, name: str, label: str) -> str:
    """A stand-alone SVG file made fit for a page that holds several."""
    root, inside = svg[svg.index("<svg") :].split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', root)[0]
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = inside.replace("xlink:href=", "href=")
    # Every figure names its parts alike; in one page names must differ.
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    for colour, mark in _MARKS.items():
        inside = inside.replace(mark, f"var(--{colour})")
    return f'<svg {box} role="img" aria-label="{label}">{inside}'


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
        return Plot("dpo-loss", "Loss", "DPO loss", series, caption, level)
    ylabel = "nats per token, log scale"
    return Plot("sft-loss", "Loss", ylabel, series, caption, scale="log")


def _rate(stage: str, rows: Sequence[dict[str, Any]]) -> Plot:
    points = _points(rows, "train", "target_tokens_per_s")
    return Plot(
        f"{stage}-rate",
        "Speed",
        "tokens with loss per second",
        [Series("train", points, "train")] if points else [],
        "The first point includes compilation; evaluation and checkpoints are left out.",
        scale="zero",
    )


def _split(rows: Sequence[dict[str, Any]], name: str) -> list[Series]:
    both = [
        Series("train", _points(rows, "train", name), "train"),
        Series("held-out", _points(rows, "eval", f"eval_{name}"), "heldout", heldout=True),
    ]
    return [series for series in both if series.points]


def _sides(rows: Sequence[dict[str, Any]], family: str) -> list[Series]:
    lines = []
    for side in ("chosen", "rejected"):
        name = f"{family}/{side}"
        lines += [
            Series(f"{side}, train", _points(rows, "train", name), side),
            Series(f"{side}, held-out", _points(rows, "eval", f"eval_{name}"), side, heldout=True),
        ]
    return [series for series in lines if series.points]


def _points(rows: Sequence[dict[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]


def _not_tied(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("eval_rewards/ties") != 1]


def _ends(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last evaluation; empty where there is none yet."""
    evals = [row for row in rows if row["split"] == "eval"] or [{}]
    return evals[0], evals[-1]
