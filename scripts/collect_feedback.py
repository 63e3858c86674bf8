"""`python scripts/collect_feedback.py` is `python -m zephyr_jax collect_feedback`."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["collect_feedback", *sys.argv[1:]])
