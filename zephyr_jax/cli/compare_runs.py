"""One page about several training runs: what differs, curves over each other, figures, speed."""

from __future__ import annotations

import argparse

from absl import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("runs", nargs="+", metavar="WORKDIR", help="the folders of 2 to 8 runs")
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="where the page goes")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from zephyr_jax.reports.comparison import compare_runs

    logging.info("%s", compare_runs(args.runs, args.output))
