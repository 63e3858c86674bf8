"""Trains a model (SFT or DPO) by a config file, or continues an earlier run.

Any field of the config can be set from here: --config.optim.peak_lr=1e-5
"""

from __future__ import annotations

import argparse
import os

from absl import logging

from zephyr_jax import distributed
from zephyr_jax.cli.report import check_samples, report_run
from zephyr_jax.config.run import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--config", required=True, help="path of a config file, or name of a recipe"
    )
    parser.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--pack_only",
        action="store_true",
        help="only pack the data set, before a run on several hosts; needs --num_shards",
    )
    parser.add_argument(
        "--num_shards", type=int, metavar="N", help="data x fsdp of the mesh to pack for"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="the report shows replies of each checkpoint to N held-out prompts (0: none)",
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_config(args.config, args.overrides)
    check_samples(args.samples)
    distributed.start(args)
    from zephyr_jax.training.loop import fit  # after the config: its errors come at once
    from zephyr_jax.training.setup import pack

    if args.pack_only != (args.num_shards is not None):
        raise ValueError("--pack_only and --num_shards=N belong together; give both or neither")
    if args.pack_only:
        if args.num_shards < 1:
            raise ValueError(f"--num_shards={args.num_shards} must be at least 1")
        if config.mesh.auto:
            raise ValueError(
                "--pack_only needs the run's own mesh and micro-batches, and config.mesh leaves "
                "them to be chosen; plan.py --auto prints them for a slice"
            )
        pack(config, args.num_shards)
    else:
        workdir = args.workdir or os.path.join("runs", config.name)
        fit(config, workdir)
        _report(workdir, args.samples)


def _report(workdir: str, samples: int) -> None:
    """Makes the page of a run that is done; only process 0 does."""
    import jax

    if jax.process_index():
        return
    try:
        report_run(workdir, samples)
    except Exception:
        logging.error("the run in %s is done and saved; only its report failed", workdir)
        raise
