"""The plans of the 7B recipes in docs/pods.md, anew: compiled by libtpu, an hour on two cores.

    python benchmarks/pods.py          (extra plan)

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
BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"
SLICES = (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16", "2*v5e:8x8", "v4:2x2x4", "v5p:2x2x4"),
    *("v6e:4x4", "v6e:8x8", "tpu7x:2x2x2"),
)
LAID_OUT = {  # recipes for one slice, planned as their configs say
    "zephyr_7b_sft_v5e_16,zephyr_7b_dpo_v5e_16": "v5e:4x4",
    "zephyr_7b_sft_lora_v5e_8,zephyr_7b_dpo_lora_v5e_8": "v5e:2x4",
    "zephyr_7b_sft_qlora_v5e_4,zephyr_7b_dpo_qlora_v5e_4": "v5e:2x2",
}


def plans_of(configs: str, slices: str, *words: str) -> list[dict[str, Any]]:
    """The plans that the command makes."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "plans.json"
        asked = [f"--config={configs}", f"--topology={slices}", f"--output={out}", *words]
        subprocess.run([sys.executable, "-m", "zephyr_jax", "plan", *asked], check=True, cwd=ROOT)
        return json.loads(out.read_text("utf-8"))


def main() -> None:
    """Plans, and writes the page's table and the figure."""
    plans = plans_of("zephyr_7b_sft,zephyr_7b_dpo", ",".join(SLICES), "--auto")
    for configs, one in LAID_OUT.items():
        plans += plans_of(configs, one)
    write(plans)


def write(plans: list[dict[str, Any]]) -> None:
    """The plans between the page's marks, and in the figure."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(plans)}\n{END}{after}", "utf-8")
    figure(plans, FIGURE)
    sys.stdout.write(f"{PAGE}\n{FIGURE}\n")


if __name__ == "__main__":
    main()
