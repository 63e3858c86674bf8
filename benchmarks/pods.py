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

from zephyr_jax.planning.show import table

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs" / "pods.md", ROOT / "docs" / "pods.svg"
BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"
SLICES = (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16", "2*v5e:8x8", "v4:2x2x4", "v5p:2x2x4"),
    *("v6e:4x4", "v6e:8x8", "tpu7x:2x2x2"),
)
RUNS = {"zephyr_7b_sft,zephyr_7b_dpo": SLICES}


def main() -> None:
    """Plans, and writes the page's table and the figure."""
    plans = []
    with tempfile.TemporaryDirectory() as name:
        for runs, slices in RUNS.items():
            out = Path(name) / "plans.json"
            words = [f"--config={runs}", f"--topology={','.join(slices)}", "--auto"]
            command = [sys.executable, "-m", "zephyr_jax", "plan", *words, f"--output={out}"]
            subprocess.run([*command, f"--figure={FIGURE}"], check=True, cwd=ROOT)
            plans += json.loads(out.read_text("utf-8"))
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(plans)}\n{END}{after}", "utf-8")
    sys.stdout.write(f"{PAGE}\n{FIGURE}\n")


if __name__ == "__main__":
    main()
