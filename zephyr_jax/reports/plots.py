"""Which curves and histograms a run's report has, and how they are drawn.

Inline SVG in the colors of the page, so that they follow its light or dark mode.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import escape

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
    "text.color": _MARKS["ink"],
    "grid.color": _MARKS["line"],
}
_SETTINGS |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
_SETTINGS |= dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.7)
_SETTINGS |= dict.fromkeys(
    ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _MARKS["soft"]
)
_SMOOTHED = 24  # points from which on a curve is drawn smoothed, over the values as logged
_HOVERED = 200  # places of a plot that show their values under a pointer, at most


class Series(NamedTuple):
    """One line of a plot: points (step, value)."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str  # "train", "heldout", "chosen" or "rejected"
    heldout: bool = False  # dashed, with dots


class Plot(NamedTuple):
    """Lines by step; long ones of training as their running mean, over the values in faint."""

    title: str
    ylabel: str
    series: Sequence[Series]
    note: str = ""
    level: tuple[float, str] | None = None  # a dotted horizontal line: value, what it is
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


class Histogram(NamedTuple):
    """Distributions over common bins; beyond the middle 99% in the outermost; 0 is dotted."""

    title: str
    xlabel: str
    ylabel: str
    values: Mapping[str, np.ndarray]
    note: str = ""

    @property
    def caption(self) -> str:
        """The mean of each array, and the whole range."""
        means = ", ".join(f"{name} {np.mean(x):.4g}" for name, x in self.values.items())
        if len(self.values) == 1:
            means = means.split()[-1]
        together = np.concatenate(list(self.values.values()))
        ends = f"min {together.min():.4g}, max {together.max():.4g}"
        return f"Mean {means}; {ends}. {self.note}".strip()


def learning_plots(run: Run) -> list[Plot]:
    """Loss, learning rate and gradient norm, and what a preference run measures of its pairs."""
    if run.beta:
        sigmoid = run.config["dpo"].get("loss", "sigmoid") == "sigmoid"
        level = (math.log(2), "ln 2: no preference") if sigmoid else None
        start = run.evals[0].get("eval_logps/accuracies") if run.evals else None
        note = "Fraction of pairs whose chosen response has the higher implicit reward; ties count "
        note += "as wrong. Step 0, where all rewards are 0, is left out."
        before = None if start is None else (start, "SFT log-likelihood, held-out")
        wins = {"note": note, "level": before}
        rewards, logps = ([f"{x}/chosen", f"{x}/rejected"] for x in ("rewards", "logps"))
        plots = [
            _plot(run, "Loss", "preference loss", "loss", level=level),
            _plot(run, "Reward accuracy", "fraction of pairs", "rewards/accuracies", **wins),
            _plot(run, "Implicit rewards", "β · log(π / π_ref)", *rewards),
            _plot(run, "Reward margin", "chosen minus rejected", "rewards/margins"),
            _plot(run, "Log-probabilities", "nats per response", *logps),
        ]
    else:
        plots = [_plot(run, "Loss", "nats per token (log scale)", "loss", scale="log")]
    clipped = f"global norm, clipped at {run.config['optim']['max_grad_norm']:g}"
    plots.append(_plot(run, "Learning rate", "", "learning_rate", scale="zero", smooth=False))
    plots.append(_plot(run, "Gradient norm", clipped, "grad_norm"))
    return [plot for plot in plots if plot.series]


def speed_plots(run: Run) -> list[Plot]:
    """Tokens and pairs per second, MFU and goodput, as far as they were measured."""
    measured = {
        "target_tokens_per_s": ("Target tokens per second", "tokens/s"),
        "pairs_per_s": ("Pairs per second", "pairs/s"),
        "mfu": ("Model FLOPs utilization (MFU)", "fraction of peak FLOP/s"),
        "goodput": ("Goodput", "fraction of wall time in steps"),
    }
    plots = [
        _plot(run, *words, name, scale="zero", smooth=name != "goodput")
        for name, words in measured.items()
    ]
    return [plot for plot in plots if plot.series]


def _plot(run: Run, title: str, ylabel: str, *metrics: str, **options: Any) -> Plot:
    series, best = list[Series](), None
    for name in metrics:
        best = best or run.best_step(name)
        side = name.rpartition("/")[2] if len(metrics) > 1 else ""
        for split, key in (("train", name), ("held-out", f"eval_{name}")):
            rows = [row for row in run.rows if math.isfinite(row.get(key, math.nan))]
            if name == "rewards/accuracies":  # at first all rewards are 0
                rows = [row for row in rows if row.get("eval_rewards/ties") != 1]
            points = [(row["step"], row[key]) for row in rows]
            label = f"{side}, {split}" if side else split
            color = side or split.replace("-", "")
            if points:
                series.append(Series(label, points, color, split == "held-out"))
    return Plot(title, ylabel, series, best=best, **options)


def reward_plots(run: Run) -> list[Histogram]:
    """The distributions of the held-out implicit rewards of both answers, and of their margin."""
    if run.pairs is None or (run.pairs.logps == run.pairs.ref_logps).all():
        return []
    rewards = run.beta * (run.pairs.logps - run.pairs.ref_logps)
    good = run.pairs.ids > 0  # KTO's answers have a label, which is the id's sign
    unit, words = "β · log(π / π_ref)", "pairs, last evaluation."
    sides = {"chosen": rewards[:, 0], "rejected": rewards[:, 1]}
    if not good.all():
        words = "answers, chosen: labeled good, rejected: bad, last evaluation."
        sides = {"chosen": rewards[good, 0], "rejected": rewards[~good, 0]}
        sides = {side: values for side, values in sides.items() if len(values)}
    note = f"{len(good):,} held-out {words}"
    plots = [Histogram("Implicit rewards", unit, "responses", sides, note)]
    if good.all():
        margins, title = {"margin": -np.diff(rewards)[:, 0]}, "Reward margin, chosen minus rejected"
        plots.append(Histogram(title, unit, "pairs", margins, note))
    return plots


def render(plot: Plot | Histogram) -> str:
    """The plot as an `<svg>` element for an HTML page: no script, no reference outside it.

    `data-hover` has [x, text] of places with values, `data-span` the top and bottom of the axes.
    """
    import matplotlib  # takes a second, and only this needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.75), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(plot.ylabel)
        places = _draw_bins(axes, plot) if isinstance(plot, Histogram) else _draw_lines(axes, plot)
        if len(axes.get_legend_handles_labels()[0]) > 1:  # of one line the title says what it is
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
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    lines: dict[float, list[str]] = {}
    for series in plot.series:
        _draw_series(axes, plot, series)
        for step, value in series.points:
            lines.setdefault(step, [f"step {step:,}"]).append(f"{series.label} {value:.4g}")
    if plot.level:
        value, label = plot.level
        axes.axhline(value, color=_MARKS["soft"], linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    last = max([*lines, 1])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    axes.locator_params(axis="x", integer=True, nbins=7)
    if plot.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.4g}")
    else:
        axes.locator_params(axis="y", nbins=6)
        axes.set_ylim(bottom=0 if plot.scale == "zero" else None)
    thinned = sorted(lines)[:: -(-len(lines) // _HOVERED)]
    return {step: "\n".join(lines[step]) for step in thinned}


def _draw_series(axes: Any, plot: Plot, series: Series) -> None:
    style: dict[str, Any] = {"color": _MARKS[series.color], "label": series.label}
    steps, values = (np.asarray(column, float) for column in zip(*series.points, strict=True))
    if series.heldout:
        often = max(1, len(steps) // 30)
        style |= {"linestyle": (0, (4, 1.5)), "marker": "o", "markevery": often}
    elif 1 < plot.window <= len(steps):
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


def _draw_bins(axes: Any, plot: Histogram) -> dict[float, str]:
    """Draws the bars; returns middle of a bin -> its range and counts, as text."""
    together = np.concatenate(list(plot.values.values())).astype(float)
    low, high = np.quantile(together, [0.005, 0.995])
    edges = np.histogram_bin_edges(together, 40, (low, high))
    if (together == together.round()).all():  # whole numbers: bins of equally many of them
        step = max(1.0, np.ceil((high - low) / 40))
        edges = np.arange(low - 0.5, high + step, step)
    lines = [[f"{a:.4g} to {b:.4g}"] for a, b in itertools.pairwise(edges)]
    for name, values in plot.values.items():
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        label = name if len(plot.values) > 1 else plot.ylabel
        color = _MARKS.get(name, _MARKS["heldout"])
        axes.stairs(counts, edges, color=color, fill=True, alpha=0.25)
        axes.stairs(counts, edges, color=color, label=label, linewidth=1.6)
        for line, count in zip(lines, counts, strict=True):
            line.append(f"{label} {count:,}")
    if together.min() < 0 < together.max():
        axes.axvline(0, color=_MARKS["soft"], linestyle=":", linewidth=1.2)
    axes.set_xlabel(plot.xlabel)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="both", nbins=6)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    return {x: "\n".join(line) for x, line in zip(middles, lines, strict=True)}


def _inline(svg: str, label: str, data: Mapping[str, Any]) -> str:
    """A stand-alone SVG file made fit for a page that holds several, with `data-` attributes."""
    root, inside = svg[svg.index("<svg") :].split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', root)[0]
    inside = inside.replace("xlink:href=", "href=")
    # Every figure has the same ids inside; on one page ids must differ.
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{own}-", inside)
    for color, mark in _MARKS.items():
        inside = inside.replace(mark, f"var(--{color})")
    more = " ".join(f'data-{name}="{escape(json.dumps(value))}"' for name, value in data.items())
    return f'<svg {box} role="img" aria-label="{escape(label)}" {more}>{inside}'
