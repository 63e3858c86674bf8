"""Which curves and histograms a run's report has, and how they are drawn.

Inline SVG in the colors of the page, so that they follow its light or dark mode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import escape

from zephyr_jax.evaluation.pairs import PairTable, pair_columns

if TYPE_CHECKING:
    from zephyr_jax.reports.run import Run

# Colors that nothing else has; in the SVG each becomes the page's variable of that name.
_NAMES = ("ink", "soft", "line", "train", "heldout", "chosen", "rejected")
_MARKS = {name: f"#0a0b{number:02x}" for number, name in enumerate(_NAMES)}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: it takes the page's font and can be searched
    "svg.hashsalt": "zephyr_jax",  # the same run gives the same page
    "font.size": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}
_SETTINGS |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
_SETTINGS |= dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.7)
_SETTINGS |= dict.fromkeys(
    ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _MARKS["soft"]
)
_SETTINGS |= {"text.color": _MARKS["ink"], "grid.color": _MARKS["line"]}

Rows = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot: points (step, value); without a label it is not in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str  # "train", "heldout", "chosen" or "rejected"
    heldout: bool = False  # dashed, with dots


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines by step; a level is a dotted horizontal line, (value, what it is)."""

    title: str
    ylabel: str
    series: Sequence[Series]
    caption: str = ""
    level: tuple[float, str] | None = None
    scale: str = "linear"  # of the values: "linear", "zero" (linear from 0 on) or "log"


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Distributions of one or two arrays over common bins, with their means below.

    Values beyond the middle 99% are drawn in the outermost bins; a dotted line marks 0.
    """

    title: str
    xlabel: str
    ylabel: str
    values: dict[str, np.ndarray]
    note: str = ""

    @property
    def caption(self) -> str:
        """The mean of each array, and the whole range."""
        means = ", ".join(f"{name} {np.mean(x):.4g}" for name, x in self.values.items())
        if len(self.values) == 1:
            means = means.split()[-1]
        least, most = (f(list(map(f, self.values.values()))) for f in (np.min, np.max))
        return f"Mean: {means}; from {least:.4g} to {most:.4g}. {self.note}".strip()


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
    measured = (
        ("Speed", "target tokens per second", "target_tokens_per_s"),
        ("Pairs", "pairs per second", "pairs_per_s"),
        ("Model FLOPs utilization (MFU)", "share of the devices' peak", "mfu"),
        ("Goodput", "share of wall time inside steps", "goodput"),
    )
    plots = [Plot(title, unit, _line(run, name), scale="zero") for title, unit, name in measured]
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


def render(plot: Plot | Histogram) -> str:
    """The plot as an `<svg>` element for an HTML page: no script, no reference outside it."""
    import matplotlib  # takes a second, and only this needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.75), layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(plot.ylabel)
        if isinstance(plot, Histogram):
            _draw_bins(axes, plot)
        else:
            _draw_lines(axes, plot)
        if len(axes.get_legend_handles_labels()[0]):
            figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
        svg = io.BytesIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    return _inline(svg.getvalue().decode(), plot.title)


def _draw_lines(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    for series in plot.series:
        style: dict[str, Any] = {}
        if series.heldout:
            often = max(1, len(series.points) // 30)
            style = {"linestyle": (0, (4, 1.5)), "marker": "o", "markevery": often}
        if len(series.points) == 1:
            style["marker"] = "o"
        steps, values = zip(*series.points, strict=True)
        axes.plot(steps, values, color=_MARKS[series.color], label=series.label, **style)
    if plot.level:
        value, label = plot.level
        axes.axhline(value, color=_MARKS["soft"], linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    last = max([step for series in plot.series for step, _ in series.points] + [1])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    axes.locator_params(axis="x", integer=True, nbins=7)
    if plot.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.locator_params(axis="y", nbins=6)
        axes.set_ylim(bottom=0 if plot.scale == "zero" else None)


def _draw_bins(axes: Any, plot: Histogram) -> None:
    together = np.concatenate(list(plot.values.values())).astype(float)
    low, high = np.quantile(together, [0.005, 0.995])
    edges = np.histogram_bin_edges(together, 40, (low, high))
    if (together == together.round()).all():  # whole numbers: bins of equally many of them
        step = max(1.0, np.ceil((high - low) / 40))
        edges = np.arange(low - 0.5, high + step, step)
    for name, values in plot.values.items():
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        label = name if len(plot.values) > 1 else ""
        color = _MARKS.get(name, _MARKS["heldout"])
        axes.stairs(counts, edges, color=color, label=label, linewidth=1.6)
    if together.min() < 0 < together.max():
        axes.axvline(0, color=_MARKS["soft"], linestyle=":", linewidth=1.2)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", nbins=6)


def _inline(svg: str, label: str) -> str:
    """A stand-alone SVG file made fit for a page that holds several."""
    root, inside = svg[svg.index("<svg") :].split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', root)[0]
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = inside.replace("xlink:href=", "href=")
    # Every figure has the same ids inside; on one page ids must differ.
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{own}-", inside)
    for color, mark in _MARKS.items():
        inside = inside.replace(mark, f"var(--{color})")
    return f'<svg {box} role="img" aria-label="{escape(label)}">{inside}'
