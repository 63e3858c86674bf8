"""`python scripts/train.py` is `python -m zephyr_jax train`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
