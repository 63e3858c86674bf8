"""50 SFT and 50 DPO steps of ours compared with transformers + TRL: the same model, ids and order.

    python benchmarks/trajectory/run.py            both sides: results.json, results.md, the plot
    python benchmarks/trajectory/run.py --store    ours alone: tests/stored/trajectory.json

Ours packs, shares prompts and computes the reference once; theirs does none of these. Prints a
table, and fails where a curve is further than `curves.BOUND` of its own largest value from the
other, or a loss falls by less than `curves.FALL`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STORED = HERE.parents[1] / "tests" / "data" / "trajectory.json"
_VERSIONS = ("jax", "optax", "torch", "transformers", "trl")


def compare(root: Path, out: Path) -> list[str]:
    """Runs both sides and writes the results; what is not as it should be, a line each."""
    import curves
    import ours
    import plot
    import theirs

    one = ours.train(root)
    other = theirs.train(root)
    found, falls = curves.gaps(one, other), curves.falls(one)
    curves.write(out / "results.json", {"zephyr_jax": one, "transformers + TRL": other})
    plot.draw(one, other, out / "trajectory.svg")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)
    fell = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in falls.items())
    text = (
        f"Both sides over {curves.STEPS} steps of each stage, float32 on a CPU, with {versions}.\n"
        f"The loss falls by: {fell}.\n\n{curves.table(found)}"
    )
    (out / "results.md").write_text(text)
    sys.stdout.write(text)
    wrong = [
        f"{gap.stage} {gap.name} is {gap.share:.1e} apart, more than {curves.BOUND}"
        for gap in found
        if gap.share > curves.BOUND
    ]
    return wrong + [
        f"the loss of {stage} falls by {share:.2f} only, less than {curves.FALL}"
        for stage, share in falls.items()
        if share < curves.FALL
    ]


def main() -> None:
    """Runs what is asked for; exits with 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="the reference that `make test` reads")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        if args.store:
            import curves
            import ours

            curves.write(STORED, {"zephyr_jax": ours.train(Path(name))})
            return
        wrong = compare(Path(name), args.out)
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
