"""`python scripts/inspect_data.py` is `python -m zephyr_jax inspect_data`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["inspect_data", *sys.argv[1:]])
