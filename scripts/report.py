"""`python scripts/report.py` is `python -m zephyr_jax report`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
