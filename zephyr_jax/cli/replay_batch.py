"""Recomputes the batch of a bad step document by document, and names those that are to blame.

The parameters are those of the newest checkpoint before the step, adapters merged.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("workdir", help="the run's folder")
    parser.add_argument("step", type=int, help="a step whose batch is in WORKDIR/bad_steps")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from zephyr_jax.evaluation.bad_steps import replay  # after the arguments: errors come at once

    sys.stdout.write("\n".join([*replay(args.workdir, args.step), ""]))
