"""Curves and histograms as inline SVG in the colors of the page, so that they follow its mode."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from zephyr_jax.reports.html import escape

# Colors that nothing else has; in the SVG each becomes the page's variable of that name.
_NAMES = ("ink", "soft", "line", "train", "heldout", "chosen", "rejected")
_MARKS = {name: f"#0a0b{number:02x}" for number, name in enumerate(_NAMES)}
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
    """One line of a plot: points (step, value); held-out lines are dashed and have dots.

    A line without a label is not in the legend.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str  # "train", "heldout", "chosen" or "rejected"
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
    xlabel: str = "step"


@dataclasses.dataclass(frozen=True)
class Bars:
    """One distribution of a histogram: a count for every bin, drawn as steps."""

    label: str
    counts: Sequence[float]
    color: str  # as of a Series


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
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
        svg = io.BytesIO()
        nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nobody)
    return _inline(svg.getvalue().decode(), plot.name, f"{plot.title}, by {plot.xlabel}")


def figures(plots: Iterable[Plot | Histogram]) -> str:
    """The plots with their titles and captions, side by side where there is room."""
    drawn = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{render(plot)}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in plots
    )
    return f'<div class="plots">{drawn}</div>'


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
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    last = max([step for series in plot.series for step, _ in series.points] + [1])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    if last >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    axes.locator_params(axis="x", integer=True, nbins=8 if last < 10_000 else 6)
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
        color = _MARKS[bars.color]
        axes.stairs(bars.counts, plot.edges, color=color, label=bars.label, linewidth=1.6)
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
    for color, mark in _MARKS.items():
        inside = inside.replace(mark, f"var(--{color})")
    return f'<svg {box} role="img" aria-label="{label}">{inside}'
