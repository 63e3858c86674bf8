"""Recomputes the plans of the 7B recipes in docs/pods.md with libtpu: three hours on two cores.

    python benchmarks/pods.py                       all of them, and the figure
    python benchmarks/pods.py curve sampling        these tables
    python benchmarks/pods.py plans --only=v5e:8x8  the rows of these slices, comma-separated

It needs the extra plan. Compiled programs are kept in ~/.cache/zephyr_jax/plans, so that a second
run takes minutes. Rows that are not computed again stay; a dagger marks those of older programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from zephyr_jax.planning.compiling import parse_topology
from zephyr_jax.planning.plans import sample_table, table

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs" / "pods.md", ROOT / "docs" / "pods.svg"
SLICES = "v5e:4x4,v5e:8x8,v5e:16x16,2*v5e:8x8,v4:2x2x4,v5p:2x2x4,v6e:4x4,v6e:8x8,tpu7x:2x2x2"
FOR_ONE_SLICE = {  # recipes for one slice, planned as their configs say
    "zephyr_7b_sft_v5e_16,zephyr_7b_dpo_v5e_16": "v5e:4x4",
    "zephyr_7b_sft_lora_v5e_8,zephyr_7b_dpo_lora_v5e_8": "v5e:2x4",
    "zephyr_7b_sft_qlora_v5e_4,zephyr_7b_dpo_qlora_v5e_4": "v5e:2x2",
}
LONG_ROWS = (  # as many tokens a batch as the recipe, in rows of 32,768
    *("--config.data.seq_len=32768", "--config.train.batch_size=8"),
    *("--config.mesh.fsdp=4", "--config.mesh.context=4", "--config.train.micro_batches=2"),
)
SAVERS = {  # name -> flags on top of zephyr_7b_sft_v5e_16
    "the recipe": (),
    "`train.remat=offload`": ("--config.train.remat=offload",),
    '`train.remat=("q", "k", "v")`': ("--config.train.remat=('q', 'k', 'v')",),
    "`optim.mu_dtype=bfloat16`": ("--config.optim.mu_dtype=bfloat16",),
    "`optim.name=adafactor`": (
        *(
            "--config.optim.name=adafactor",
            "--config.optim.betas=(0.9, 0.8)",
            "--config.optim.eps=1e-30",
        ),
    ),
    "`optim.offload_optimizer=True`": ("--config.optim.offload_optimizer=true",),
}
# Slices of 16 to 1,024 chips; rows a chip held at 8, and the recipe's 128 rows held.
GROWING = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "2*v5e:16x16", "4*v5e:16x16")
GROWING += ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v6e:4x4", "v6e:8x8", "v6e:16x16")
BATCHES = ("8", "32", "64", "128", "256")
MEMORY_COLORS = {
    "parameters": "tab:blue",
    "moments": "tab:cyan",
    "frozen base": "tab:purple",
    "synced reference": "tab:pink",
    "batch": "tab:brown",
    "kept for the backward pass": "tab:orange",
    "other temporaries": "0.75",
}
TIME_COLORS = {
    "compute": "tab:blue",
    "kernels": "tab:green",
    "hidden_transfers": "0.75",
    "exposed_transfers": "tab:red",
}


def plans_of(configs: str, slices: str, *words: str) -> list[dict[str, Any]]:
    """The plans that the command makes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "plans.json"
        flags = [f"--config={configs}", f"--topology={slices}", f"--output={out}", *words]
        command = [sys.executable, "-m", "zephyr_jax", "plan", *flags, "--processes=1"]
        done = subprocess.run(command, check=False, cwd=ROOT)
        if done.returncode not in (0, 1):  # 1: nothing fits, which is a plan too
            raise SystemExit(done.returncode)
        return json.loads(out.read_text("utf-8"))


def main() -> None:
    """Plans, and writes the page's tables and the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--only", default="", help="slices, comma-separated (default: all)")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    for name in args.tables or TABLES:
        write(name, TABLES[name](only))
    sys.stdout.write(f"{PAGE}\n")


def wanted(slices: Sequence[str], only: set[str]) -> list[str]:
    """Those of the slices that are asked for."""
    return [name for name in slices if not only or name in only]


def plans_table(only: set[str]) -> str:
    """The recipes on every slice, and the figure if there are all of them."""
    plans = []
    for name in wanted(SLICES.split(","), only):
        plans += plans_of("zephyr_7b_sft,zephyr_7b_dpo", name, "--auto")
    for configs, one in FOR_ONE_SLICE.items():
        plans += plans_of(configs, one) if wanted([one], only) else []
    if not only:
        figure(plans, FIGURE)
    return table(plans)


def long_rows(only: set[str]) -> str:
    """Rows of 32,768 tokens."""
    slices = ",".join(wanted(["v6e:4x4", "v5p:2x2x4"], only))
    return table(plans_of("zephyr_7b_sft", slices, *LONG_ROWS) if slices else [])


def savers(only: set[str]) -> str:
    """What saves memory, each alone."""
    if not wanted(["v5e:4x4"], only):
        return savers_table({})
    each = {k: plans_of("zephyr_7b_sft_v5e_16", "v5e:4x4", *words) for k, words in SAVERS.items()}
    return savers_table({name: plan for name, (plan,) in each.items()})


def curve(only: set[str]) -> str:
    """SFT on more and more chips."""
    head = ["slice", "rows", "mesh", "micro-batches", "GiB a device", "step", "MFU"]
    lines = [head, ["---"] * len(head)]
    for name in wanted(GROWING, only):
        for rows in dict.fromkeys((8 * parse_topology(name).chips, 128)):
            batch = f"--config.train.batch_size={rows}"
            (plan,) = plans_of("zephyr_7b_sft", name, "--auto", batch)
            if "refused" in plan:
                lines.append([name, str(rows), plan["refused"], *["-"] * 4])
                continue
            sizes = " ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
            held = f"{plan['gib']['needed']:.2f} of {plan['gib']['usable']:.2f}"
            time = [f"{plan['seconds']['step']:.2f} s", f"{100 * plan['mfu']:.0f}%"]
            time = time if plan["fits"] else ["does not fit", "-"]
            lines.append([name, str(rows), sizes, str(plan["micro_batches"]), held, *time])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sampling(only: set[str]) -> str:
    """Replies on a slice."""
    slices = ",".join(wanted(["v5e:2x4", "v5p:2x2x1", "v6e:2x4"], only))
    return sample_table(plans_of("zephyr_7b_sft", slices, "--sample", *BATCHES))


def savers_table(plans: dict[str, dict[str, Any]]) -> str:
    """What one run needs with each of these words, a line each."""
    kinds = ("parameters", "moments", "kept for the backward pass", "other temporaries")
    head = ["with", *kinds, "GiB a device", "step", "MFU"]
    rows = [head, ["---"] * len(head)]
    for name, plan in plans.items():
        held = [f"{plan['gib_by_kind'].get(kind, 0.0):.2f}" for kind in kinds]
        time = ["does not fit", "-"]
        if plan["fits"]:
            time = [f"{plan['seconds']['step']:.2f} s", f"{100 * plan['mfu']:.0f}%"]
        rows.append([name, *held, f"{plan['gib']['needed']:.2f}", *time])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write(name: str, text: str) -> None:
    """The text between two marks of the page; rows that it lacks stay there as they were.

    A row is known by its first cells, a note by the run and the slice that it names.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    old, _, after = rest.partition(end)
    rows, notes = {}, {}
    for line in filter(None, [*old.splitlines(), *text.splitlines()]):
        if line[0] == "|":
            cells = [cell.strip(" †") for cell in line.split("|")[1:]]
            rows[tuple(cells[: KEYS[name]])] = line
            notes[f"* {' on '.join(cells[:2])}"] = []
        else:
            notes.setdefault(line.split(": ")[0], []).append(line)
    lines = [line for each in notes.values() for line in each]
    body = "\n".join([*rows.values(), *([""] if lines else []), *lines])
    PAGE.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}", "utf-8")


def figure(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory by kind and time by part of every plan, as SVG: the same bytes from the same plans."""
    plans = [plan for plan in plans if "refused" not in plan]
    names = [f"{plan['config']} {plan['topology']}" for plan in plans]
    with mpl.rc_context({"svg.hashsalt": "plan", "svg.fonttype": "none", "font.size": 8}):
        chart = Figure(figsize=(11, 1.4 + 0.3 * len(plans)), layout="constrained")
        left, right = chart.subplots(1, 2, sharey=True)
        bars(left, names, [plan["gib_by_kind"] for plan in plans], MEMORY_COLORS)
        usable = [plan["gib"]["usable"] for plan in plans]
        left.plot(usable, names, "k|", ms=14, label="usable")
        left.set_xlabel("GiB a device")
        bars(right, names, [plan.get("seconds", {}) for plan in plans], TIME_COLORS)
        right.set_xlabel("seconds a step (hidden transfers run during the work, not after it)")
        left.invert_yaxis()
        for axes in (left, right):
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=7)
        chart.savefig(path, format="svg", metadata={"Date": None})


def bars(
    axes: Any, names: list[str], parts: list[dict[str, float]], colors: dict[str, str]
) -> None:
    """Horizontal bars, stacked part by part."""
    ends = [0.0] * len(names)
    for part, color in colors.items():
        widths = [one.get(part, 0.0) for one in parts]
        if any(widths):
            axes.barh(names, widths, left=ends, color=color, label=part.replace("_", " "))
            ends = [end + width for end, width in zip(ends, widths, strict=True)]


TABLES = {"plans": plans_table, "long rows": long_rows, "savers": savers}
TABLES |= {"curve": curve, "sampling": sampling}
KEYS = {"plans": 2, "long rows": 2, "savers": 1, "curve": 2, "sampling": 5}  # cells

if __name__ == "__main__":
    main()
