"""`python scripts/port_weights.py` is `python -m zephyr_jax port_weights`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["port_weights", *sys.argv[1:]])
