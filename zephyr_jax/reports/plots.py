"""Which curves and histograms a run's report has, and how they are drawn.

Inline SVG in the colors of the page, so that they follow its light or dark mode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
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

_SMOOTHED = 24  # points from which on a curve is drawn smoothed, over the values as logged
_HOVERED = 200  # places of a plot that show their values under a pointer, at most

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
    """Lines by step; a level is a dotted horizontal line, (value, what it is).

    Long curves of training steps are drawn as their running mean, over the logged values in faint.
    """

    title: str
    ylabel: str
    series: Sequence[Series]
    note: str = ""
    level: tuple[float, str] | None = None
    scale: str = "linear"  # of the values: "linear", "zero" (linear from 0 on) or "log"
    smooth: bool = True
    best: int | None = None  # a step whose held-out value is marked

    @property
    def window(self) -> int:
        """How many logged values the running mean is over, an odd number; 1: no mean."""
        longest = max([len(each.points) for each in self.series if not each.heldout], default=0)
        return longest // 24 * 2 + 1 if self.smooth and longest >= _SMOOTHED else 1

    @property
    def caption(self) -> str:
        """The note, and what the smoothed line is."""
        mean = f"Bold: mean of {self.window} logged values." if self.window > 1 else ""
        return f"{self.note} {mean}".strip()


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
        return f"Mean {means}; min {least:.4g}, max {most:.4g}. {self.note}".strip()


def learning_plots(run: Run) -> list[Plot]:
    """Loss, learning rate and gradient norm, and what a preference run measures of its pairs."""
    loss, best = _both(run.rows, "loss"), run.best_step("loss")
    plots = [Plot("Loss", "nats per token (log scale)", loss, scale="log", best=best)]
    if run.beta:
        sigmoid = run.config["dpo"].get("loss", "sigmoid") == "sigmoid"
        level = (math.log(2), "ln 2: no preference") if sigmoid else None
        plots = [Plot("Loss", "preference loss", loss, level=level, best=best), *_pair_plots(run)]
    clip, norm = run.config["optim"]["max_grad_norm"], _line(run, "grad_norm")
    plots += [
        Plot("Learning rate", "", _line(run, "learning_rate"), scale="zero", smooth=False),
        Plot("Gradient norm", f"global norm, clipped at {clip:g}", norm),
    ]
    return [plot for plot in plots if plot.series]


def speed_plots(run: Run) -> list[Plot]:
    """Tokens and pairs per second, MFU and goodput, as far as they were measured."""
    measured = (
        ("Target tokens per second", "tokens/s", "target_tokens_per_s"),
        ("Pairs per second", "pairs/s", "pairs_per_s"),
        ("Model FLOPs utilization (MFU)", "fraction of peak FLOP/s", "mfu"),
        ("Goodput", "fraction of wall time in steps", "goodput"),
    )
    plots = [
        Plot(title, unit, _line(run, name), scale="zero", smooth=name != "goodput")
        for title, unit, name in measured
    ]
    return [plot for plot in plots if plot.series]


def reward_plots(table: PairTable, beta: float) -> list[Histogram]:
    """The distributions of the implicit rewards of both answers, and of their margin."""
    columns = pair_columns(table, beta)
    rewards = {side: columns[f"rewards/{side}"] for side in ("chosen", "rejected")}
    margins = {"margin": columns["rewards/margins"]}
    unit, note = "β · log(π / π_ref)", f"{len(table.ids):,} held-out pairs, last evaluation."
    good = table.ids > 0
    if good.all():
        return [
            Histogram("Implicit rewards", unit, "responses", rewards, note),
            Histogram("Reward margin, chosen minus rejected", unit, "pairs", margins, note),
        ]
    # KTO's answers have a label, which is the id's sign.
    rewards = {"chosen": rewards["chosen"][good], "rejected": rewards["chosen"][~good]}
    rewards = {side: values for side, values in rewards.items() if len(values)}
    note = note.replace("pairs", "answers, chosen: labeled good, rejected: bad")
    return [Histogram("Implicit rewards", unit, "responses", rewards, note)]


def _pair_plots(run: Run) -> list[Plot]:
    start = None
    if run.evals and "eval_logps/accuracies" in run.evals[0]:
        start = (run.evals[0]["eval_logps/accuracies"], "SFT log-likelihood, held-out")
    untied = [row for row in run.rows if row.get("eval_rewards/ties") != 1]
    note = "Fraction of pairs whose chosen response has the higher implicit reward; ties count as "
    note += "wrong. Step 0, where all rewards are 0, is left out."
    wins, margins = _both(untied, "rewards/accuracies"), _both(run.rows, "rewards/margins")
    by_wins, by_margins = (run.best_step(f"rewards/{x}") for x in ("accuracies", "margins"))
    return [
        Plot("Reward accuracy", "fraction of pairs", wins, note, start, best=by_wins),
        Plot("Implicit rewards", "β · log(π / π_ref)", _sides(run.rows, "rewards")),
        Plot("Reward margin", "chosen minus rejected", margins, best=by_margins),
        Plot("Log-probabilities", "nats per response", _sides(run.rows, "logps")),
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
    """The plot as an `<svg>` element for an HTML page: no script, no reference outside it.

    Its `data-hover` holds [x, text] of the places that show their values under a pointer, and
    `data-span` the top and bottom of the axes, in the units of the view box.
    """
    import matplotlib  # takes a second, and only this needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.75), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(plot.ylabel)
        places = _draw_bins(axes, plot) if isinstance(plot, Histogram) else _draw_lines(axes, plot)
        if len(axes.get_legend_handles_labels()[0]):
            figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
        svg = io.BytesIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
        to_page = axes.get_xaxis_transform().transform
        hover = [[round(to_page((x, 0.0))[0], 1), text] for x, text in places.items()]
        box, height = axes.get_window_extent(), figure.bbox.height
    data = {"hover": hover, "span": [round(height - box.y1, 1), round(height - box.y0, 1)]}
    return _inline(svg.getvalue().decode(), plot.title, data)


def _draw_lines(axes: Any, plot: Plot) -> dict[float, str]:
    """Draws the series; returns step -> the values there, as text."""
    from matplotlib.ticker import EngFormatter

    for series in plot.series:
        _draw_series(axes, plot, series)
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
        axes.set_yticks(log_ticks(*axes.get_ylim()), minor=False)
        axes.set_yticks((), minor=True)
        axes.yaxis.set_major_formatter("{x:.4g}")
    else:
        axes.locator_params(axis="y", nbins=6)
        axes.set_ylim(bottom=0 if plot.scale == "zero" else None)
    lines: dict[float, list[str]] = {}
    for series in plot.series:
        for step, value in series.points:
            shown = f"{series.label} {value:.4g}".strip()
            lines.setdefault(step, [f"step {step:,}"]).append(shown)
    thinned = sorted(lines)[:: -(-len(lines) // _HOVERED)]
    return {step: "\n".join(lines[step]) for step in thinned}


def _draw_series(axes: Any, plot: Plot, series: Series) -> None:
    style: dict[str, Any] = {"color": _MARKS[series.color], "label": series.label}
    steps, values = (np.asarray(column, float) for column in zip(*series.points, strict=True))
    if series.heldout:
        often = max(1, len(steps) // 30)
        style |= {"linestyle": (0, (4, 1.5)), "marker": "o", "markevery": often}
    elif plot.window > 1 and len(steps) >= plot.window:
        axes.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.8)
        values = running_mean(values, plot.window)
    if len(steps) == 1:
        style["marker"] = "o"
    axes.plot(steps, values, **style)
    if series.heldout and plot.best in steps:
        value = values[list(steps).index(plot.best)]
        ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
        label = f"best, step {plot.best:,}"
        axes.plot([plot.best], [value], color=style["color"], label=label, **ring)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of `window` values, an odd number, around each; of fewer near the ends."""
    sums, counts = (np.convolve(x, np.ones(window), "same") for x in (values, np.ones(len(values))))
    return sums / counts


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis: as many as fit, at most six, at least two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for parts in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [part * 10.0**decade for decade in decades for part in parts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    if len(ticks) < 2:  # less than a factor of two: as on a linear axis
        from matplotlib.ticker import MaxNLocator

        within = MaxNLocator(4).tick_values(low, high)
        return [float(tick) for tick in within if low <= tick <= high]
    return ticks[:: -(-len(ticks) // 6)]


def _draw_bins(axes: Any, plot: Histogram) -> dict[float, str]:
    """Draws the bars; returns middle of a bin -> its range and counts, as text."""
    together = np.concatenate(list(plot.values.values())).astype(float)
    low, high = np.quantile(together, [0.005, 0.995])
    edges = np.histogram_bin_edges(together, 40, (low, high))
    if (together == together.round()).all():  # whole numbers: bins of equally many of them
        step = max(1.0, np.ceil((high - low) / 40))
        edges = np.arange(low - 0.5, high + step, step)
    middles = (edges[:-1] + edges[1:]) / 2
    lines = [[f"{a:.4g} to {b:.4g}"] for a, b in itertools.pairwise(edges)]
    for name, values in plot.values.items():
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        label = name if len(plot.values) > 1 else ""
        color = _MARKS.get(name, _MARKS["heldout"])
        axes.stairs(counts, edges, color=color, fill=True, alpha=0.25)
        axes.stairs(counts, edges, color=color, label=label, linewidth=1.6)
        for line, count in zip(lines, counts, strict=True):
            line.append(f"{label or plot.ylabel} {count:,}")
    if together.min() < 0 < together.max():
        axes.axvline(0, color=_MARKS["soft"], linestyle=":", linewidth=1.2)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", nbins=6)
    return {x: "\n".join(line) for x, line in zip(middles.tolist(), lines, strict=True)}


def _inline(svg: str, label: str, data: dict[str, Any]) -> str:
    """A stand-alone SVG file made fit for a page that holds several, with `data-` attributes."""
    root, inside = svg[svg.index("<svg") :].split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', root)[0]
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = inside.replace("xlink:href=", "href=")
    # Every figure has the same ids inside; on one page ids must differ.
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{own}-", inside)
    for color, mark in _MARKS.items():
        inside = inside.replace(mark, f"var(--{color})")
    more = " ".join(f'data-{name}="{escape(json.dumps(value))}"' for name, value in data.items())
    return f'<svg {box} role="img" aria-label="{escape(label)}" {more}>{inside}'
