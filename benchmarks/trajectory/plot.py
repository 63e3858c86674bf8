"""One picture of all curves: both sides over each other, and below each pair their difference."""

from __future__ import annotations

from pathlib import Path

import curves
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

_LEAST = 1e-9  # differences below are drawn here, equal values too


def draw(ours: curves.Curves, theirs: curves.Curves, path: Path) -> None:
    """Writes the picture as SVG, the same bytes from the same numbers."""
    every = [(stage, name) for stage, named in ours.items() for name in named]
    every = [(stage, name) for stage, name in every if name != "learning_rate"]
    columns = 5
    blocks = -(-len(every) // columns)
    with mpl.rc_context({"svg.hashsalt": "trajectory", "svg.fonttype": "none", "font.size": 7}):
        figure = Figure(figsize=(2.3 * columns, 3.4 * blocks), layout="constrained")
        ratios = [3, 1.4] * blocks
        grid = figure.subplots(2 * blocks, columns, sharex=True, height_ratios=ratios)
        for axes in grid.flat:
            axes.set_visible(False)
        for at, (stage, name) in enumerate(every):
            block, column = divmod(at, columns)
            above, below = grid[2 * block, column], grid[2 * block + 1, column]
            a, b = np.asarray(ours[stage][name]), np.asarray(theirs[stage][name])
            steps = np.arange(1, len(a) + 1)
            above.plot(steps, b, color="tab:orange", lw=3, alpha=0.5, label="transformers + TRL")
            above.plot(steps, a, color="tab:blue", lw=0.8, label="zephyr_jax")
            above.set_title(f"{stage}: {name}")
            below.semilogy(steps, np.maximum(np.abs(a - b) / np.abs(a).max(), _LEAST), ".", ms=2)
            below.minorticks_off()
            below.axhline(curves.BOUND, color="tab:red", lw=0.8)
            below.set_ylim(_LEAST / 2, 10 * curves.BOUND)
            for axes in (above, below):
                axes.set_visible(True)
        grid[0, 0].legend()
        grid[1, 0].set_ylabel("difference / largest")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
