"""`python scripts/replay_batch.py` is `python -m zephyr_jax replay_batch`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["replay_batch", *sys.argv[1:]])
