"""`python scripts/evaluate.py` is `python -m zephyr_jax evaluate`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
