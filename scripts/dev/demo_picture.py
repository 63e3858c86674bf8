"""Draws docs/demo.svg, the landing page's picture, from a finished demo in a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from zephyr_jax.evaluation.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GRAY, BLUE, ORANGE, RED = "#7d8590", "#3d7fd9", "#d9772b", "#c0524a"  # for light and dark pages
FORMS = {"chosen": BLUE, "rejected": ORANGE, "wrong": RED}
LABELS = {"chosen": "right, chosen form", "rejected": "right, rejected form", "wrong": "wrong"}


def main(workdir: Path) -> None:
    """Two panels: the held-out loss of SFT, and the forms of the replies of three models."""
    import matplotlib
    from matplotlib.figure import Figure

    results = json.loads((workdir / "results.json").read_text())
    rows = read_metrics(workdir / "sft" / "metrics.jsonl")
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 10}
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    with matplotlib.rc_context(settings | dict.fromkeys(colors, GRAY)):
        figure = Figure(figsize=(8.4, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        points = [(row["step"], row["eval_loss"]) for row in rows if row["split"] == "eval"]
        left.plot(*zip(*points, strict=True), "o-", color=BLUE, markersize=4)
        left.set(title="SFT: held-out loss", xlabel="step", ylabel="nats per token", ylim=0)
        models, start = ("base", "sft", "dpo"), [0.0] * 3
        for form, color in FORMS.items():
            shares = [100 * results["forms"][form][name] for name in models]
            right.barh(range(3), shares, left=start, color=color, label=LABELS[form], height=0.6)
            start = [a + b for a, b in zip(start, shares, strict=True)]
        right.set_yticks(range(3), ("random", "SFT", "DPO"))
        right.invert_yaxis()
        right.set(title="replies to 180 held-out questions, %", xlim=(0, 100))
        right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        figure.savefig(ROOT / "docs" / "demo.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
