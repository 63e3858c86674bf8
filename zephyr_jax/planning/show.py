"""Plans as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = ("run", "slice", "mesh", "GiB a device", "step", "MFU", "hours", "chip-hours")


def table(plans: Sequence[dict[str, Any]]) -> str:
    """The plans as a Markdown table, a slice a row, and their warnings and advice below."""
    rows = [_HEAD, ["---"] * len(_HEAD), *(_row(plan) for plan in plans)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [
        f"* {plan['config']} on {plan['topology']}: {note}"
        for plan in plans
        for note in [*plan.get("warnings", []), *plan.get("advice", [])]
    ]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _row(plan: dict[str, Any]) -> list[str]:
    if "refused" in plan:
        return [plan["config"], plan["topology"], "-", plan["refused"], *["-"] * 4]
    sizes = " ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
    gib = plan["gib"]
    fits = "fits" if plan["fits"] else "**does not fit**"
    memory = f"{gib['needed']:.2f} of {gib['usable']:.2f}, {fits}"
    cells = [plan["config"], plan["topology"], sizes or "one device", memory]
    if not plan["fits"]:
        return [*cells, *["-"] * 4]
    cells += [f"{plan['seconds']['step']:.2f} s", f"{100 * plan['mfu']:.0f}%"]
    for name, form in (("hours", "{:.1f}"), ("chip_hours", "{:,.0f}")):
        cells.append(form.format(plan[name]) if name in plan else "-")
    return cells
