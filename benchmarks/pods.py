"""The plans of the 7B recipes in docs/pods.md, anew: compiled by libtpu, two hours on two cores.

    python benchmarks/pods.py          (extra plan; further words go to plan.py: --processes=1)

Compiled programs are kept in ~/.cache/zephyr_jax/plans, so that a second run takes minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zephyr_jax.planning.show import figure, table

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs" / "pods.md", ROOT / "docs" / "pods.svg"
SLICES = (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16", "2*v5e:8x8", "v4:2x2x4", "v5p:2x2x4"),
    *("v6e:4x4", "v6e:8x8", "tpu7x:2x2x2"),
)
LAID_OUT = {  # recipes for one slice, planned as their configs say
    "zephyr_7b_sft_v5e_16,zephyr_7b_dpo_v5e_16": "v5e:4x4",
    "zephyr_7b_sft_lora_v5e_8,zephyr_7b_dpo_lora_v5e_8": "v5e:2x4",
    "zephyr_7b_sft_qlora_v5e_4,zephyr_7b_dpo_qlora_v5e_4": "v5e:2x2",
}
LONG_ROWS = (  # as many tokens a batch as the recipe, in rows of 32,768
    *("--config.data.seq_len=32768", "--config.train.batch_size=8"),
    *("--config.mesh.fsdp=4", "--config.mesh.context=4", "--config.train.micro_batches=2"),
)
SAVERS = {  # words beside those of zephyr_7b_sft_v5e_16, and what they are called
    "the recipe": (),
    "`train.remat=offload`": ("--config.train.remat=offload",),
    '`train.remat=("q", "k", "v")`': ("--config.train.remat=('q', 'k', 'v')",),
    "`optim.mu_dtype=bfloat16`": ("--config.optim.mu_dtype=bfloat16",),
    "`optim.name=adafactor`": (
        *("--config.optim.name=adafactor", "--config.optim.b2=0.8", "--config.optim.eps=1e-30"),
    ),
    "`optim.offload_optimizer=True`": ("--config.optim.offload_optimizer=true",),
}


def plans_of(configs: str, slices: str, *words: str) -> list[dict[str, Any]]:
    """The plans that the command makes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "plans.json"
        asked = [f"--config={configs}", f"--topology={slices}", f"--output={out}", *words]
        command = [sys.executable, "-m", "zephyr_jax", "plan", *asked, *sys.argv[1:]]
        done = subprocess.run(command, check=False, cwd=ROOT)
        if done.returncode not in (0, 1):  # 1: nothing fits, which is a plan too
            raise SystemExit(done.returncode)
        return json.loads(out.read_text("utf-8"))


def main() -> None:
    """Plans, and writes the page's table and the figure."""
    plans = plans_of("zephyr_7b_sft,zephyr_7b_dpo", ",".join(SLICES), "--auto")
    for configs, one in LAID_OUT.items():
        plans += plans_of(configs, one)
    long_rows = plans_of("zephyr_7b_sft", "v6e:4x4,v5p:2x2x4", *LONG_ROWS)
    savers = {}
    for name, words in SAVERS.items():
        (savers[name],) = plans_of("zephyr_7b_sft_v5e_16", "v5e:4x4", *words)
    write("plans", table(plans))
    write("long rows", table(long_rows))
    write("savers", savers_table(savers))
    figure(plans, FIGURE)
    sys.stdout.write(f"{PAGE}\n{FIGURE}\n")


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
    """The text between two marks of the page."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
