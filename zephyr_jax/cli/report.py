"""Writes WORKDIR/report.html of a training run, finished or not."""

from __future__ import annotations

import argparse

from absl import logging

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("workdir", help="the run's folder")
    flags.add_samples(parser, "also generate replies to N held-out prompts")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    report_run(args.workdir, args.samples)


def report_run(workdir: str, samples: int | None) -> None:
    """Writes a run's report; `samples`: how many prompts get replies; None: those stored."""
    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.reports.run import read_run, write_run_report
    from zephyr_jax.reports.samples import write_samples

    if samples is not None:
        write_samples(RunConfig.from_config_dict(read_run(workdir).config), workdir, samples)
    logging.info("report: %s", write_run_report(workdir))
