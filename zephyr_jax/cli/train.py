"""Trains a model (SFT or DPO) by a config file, or continues an earlier run.

Any field of the config can be set from here: --config.optim.peak_lr=1e-5
"""

from __future__ import annotations

import argparse

from zephyr_jax import chips, distributed
from zephyr_jax.cli import flags
from zephyr_jax.config.run import load_config
from zephyr_jax.reports.fit import SAMPLES, fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, "path of a config file, or name of a recipe")
    flags.add_workdir(parser, "folder of the run (default: runs/NAME)")
    pack = "only pack the data set, as before a run on several hosts"
    parser.add_argument("--pack_only", action="store_true", help=pack)
    samples = "the report shows replies of each checkpoint to N held-out prompts (0: none)"
    number = flags.at_least(0)
    parser.add_argument("--samples", type=number, metavar="N", default=SAMPLES, help=samples)
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    chips.keep_freed_memory()
    config = load_config(args.config, args.overrides)
    distributed.start(args)
    if args.pack_only:
        from zephyr_jax.training.setup import pack  # after the config: its errors come at once

        pack(config)
        return
    with distributed.watched():
        fit(config, args.workdir, args.samples, args.began)
