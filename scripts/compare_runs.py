"""`python scripts/compare_runs.py` is `python -m zephyr_jax compare_runs`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["compare_runs", *sys.argv[1:]])
