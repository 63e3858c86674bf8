"""Compiles a run for TPU slices that are not here (python scripts/plan.py --help)."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
