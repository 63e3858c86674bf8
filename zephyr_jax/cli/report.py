"""Writes WORKDIR/report.html of a training run, finished or not."""

from __future__ import annotations

import argparse

from absl import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("workdir", help="the run's folder")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="also generate replies to N held-out prompts"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_samples(args.samples)
    report_run(args.workdir, args.samples)


def check_samples(n: int | None) -> None:
    """Raises a ValueError for a negative number of prompts."""
    if n is not None and n < 0:
        raise ValueError(f"--samples={n} must be 0 or more")


def report_run(workdir: str, samples: int | None) -> None:
    """Writes a run's report; `samples`: how many prompts get replies; None: those stored."""
    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.reports.run import read_run, write_run_report
    from zephyr_jax.reports.samples import write_samples

    if samples is not None:
        write_samples(RunConfig.from_config_dict(read_run(workdir).config), workdir, samples)
    logging.info("report: %s", write_run_report(workdir))
