"""`python scripts/prepare_data.py` is `python -m zephyr_jax prepare_data`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["prepare_data", *sys.argv[1:]])
