"""The flags that say how a command draws replies."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("temperature", "top_k", "top_p", "min_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --temperature, --top_k, --top_p and --min_p."""
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=0.95, help="1: all tokens")
    parser.add_argument("--min_p", type=float, default=0.0, help="0: all tokens")


def of(args: argparse.Namespace) -> dict[str, Any]:
    """What was set, by the names that `zephyr_jax.generate` has for it."""
    return {name: getattr(args, name) for name in NAMES}
