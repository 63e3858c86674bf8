"""Trains a model (SFT or DPO) by a config file, or continues an earlier run.

Any field of the config can be set from here: --config.optim.peak_lr=1e-5
"""

from __future__ import annotations

import argparse
import os

from absl import logging

from zephyr_jax import distributed
from zephyr_jax.cli import flags
from zephyr_jax.cli.report import report_run
from zephyr_jax.config.run import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    flags.add_config(parser, "path of a config file, or name of a recipe")
    flags.add_workdir(parser, "folder of the run (default: runs/NAME)")
    pack = "only pack the data set, as before a run on several hosts"
    parser.add_argument("--pack_only", action="store_true", help=pack)
    samples = "the report shows replies of each checkpoint to N held-out prompts (0: none)"
    flags.add_samples(parser, samples, 3)
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_config(args.config, args.overrides)
    distributed.start(args)
    import jax

    from zephyr_jax.training.loop import fit  # after the config: its errors come at once
    from zephyr_jax.training.setup import pack

    if args.pack_only:
        pack(config)
        return
    workdir = args.workdir or os.path.join("runs", config.name)
    fit(config, workdir)
    if jax.process_index():
        return
    try:
        report_run(workdir, args.samples)
    except Exception:
        logging.error("the run in %s is done and saved; only its report failed", workdir)
        raise
