"""A plan as a table, and as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEAD = ("run", "slice", "mesh", "GiB a device", "step", "MFU", "hours", "chip-hours")
_MEMORY_COLOURS = {
    "parameters": "tab:blue",
    "moments": "tab:cyan",
    "frozen base": "tab:purple",
    "synced reference": "tab:pink",
    "batch": "tab:brown",
    "kept for the backward pass": "tab:orange",
    "other temporaries": "0.75",
}
_TIMES = {
    "compute": "tab:blue",
    "kernels": "tab:green",
    "hidden_transfers": "0.75",
    "exposed_transfers": "tab:red",
}


def table(plans: Sequence[dict[str, Any]]) -> str:
    """The plans as a Markdown table, a slice a row, and their warnings below."""
    priced = any("cost" in plan for plan in plans)
    head = [*_HEAD, *(["cost"] if priced else [])]
    rows = [head, ["---"] * len(head), *(_row(plan, priced) for plan in plans)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [
        f"* {plan['config']} on {plan['topology']}: {note}"
        for plan in plans
        for note in [*plan.get("warnings", []), *plan.get("advice", [])]
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _row(plan: dict[str, Any], priced: bool) -> list[str]:
    mesh = plan.get("mesh", {})
    sizes = " ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
    cells = [plan["config"], plan["topology"], sizes]
    if "refused" in plan:
        return [*cells[:2], "-", plan["refused"], *["-"] * (4 + priced)]
    gib = plan["gib"]
    fits = "fits" if plan["fits"] else "**does not fit**"
    cells.append(f"{gib['needed']:.2f} of {gib['usable']:.2f}, {fits}")
    if not plan["fits"]:
        return [*cells, *["-"] * (4 + priced)]
    cells += [f"{plan['seconds']['step']:.2f} s", f"{100 * plan['mfu']:.0f}%"]
    for name, form in (("hours", "{:.1f}"), ("chip_hours", "{:,.0f}")):
        cells.append(form.format(plan[name]) if name in plan else "-")
    if priced:
        cells.append(f"{plan['cost']:,.0f}" if "cost" in plan else "-")
    return cells


def figure(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory by kind and time by part of every plan, as SVG: the same bytes from the same plans."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    plans = [plan for plan in plans if "refused" not in plan]
    names = [f"{plan['config']} {plan['topology']}" for plan in plans]
    with mpl.rc_context({"svg.hashsalt": "plan", "svg.fonttype": "none", "font.size": 8}):
        drawn = Figure(figsize=(11, 1.4 + 0.3 * len(plans)), layout="constrained")
        left, right = drawn.subplots(1, 2, sharey=True)
        _bars(left, names, [plan["gib_by_kind"] for plan in plans], _MEMORY_COLOURS)
        usable = [plan["gib"]["usable"] for plan in plans]
        left.plot(usable, names, "k|", ms=14, label="usable")
        left.set_xlabel("GiB a device")
        _bars(right, names, [plan.get("seconds", {}) for plan in plans], _TIMES)
        right.set_xlabel("seconds a step (hidden transfers beside the work, not after it)")
        left.invert_yaxis()
        for axes in (left, right):
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, format="svg", metadata={"Date": None})


def _bars(
    axes: Any, names: list[str], parts: list[dict[str, float]], colors: dict[str, str]
) -> None:
    """Horizontal bars, piled up part by part."""
    ends = [0.0] * len(names)
    for part, color in colors.items():
        widths = [one.get(part, 0.0) for one in parts]
        if any(widths):
            axes.barh(names, widths, left=ends, color=color, label=part.replace("_", " "))
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
