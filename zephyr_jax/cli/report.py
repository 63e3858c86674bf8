"""Writes WORKDIR/report.html of a training run, finished or not."""

from __future__ import annotations

import argparse

from zephyr_jax.cli import flags
from zephyr_jax.reports.fit import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("workdir", help="the run's folder")
    flags.add_samples(parser, "also generate replies to N held-out prompts")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    write_report(args.workdir, args.samples)
