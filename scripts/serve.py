"""Serves a model with OpenAI's interface (python scripts/serve.py --help)."""

import sys

from zephyr_jax.__main__ import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
