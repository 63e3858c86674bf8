"""`python scripts/generate.py` is `python -m zephyr_jax generate`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
