"""Trains as a config file says (SFT or DPO), or goes on where an earlier run stopped.

Any field of the config can be set from here: --config.optim.peak_lr=1e-5
"""

from __future__ import annotations

import argparse

from zephyr_jax import distributed
from zephyr_jax.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--config", required=True, help="a config file, or the name of a recipe")
    parser.add_argument("--workdir", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--pack_for",
        type=int,
        metavar="SHARDS",
        help="only pack the set, for a mesh whose data x fsdp is SHARDS (before a pod's run)",
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_config(args.config, args.overrides)
    distributed.start(args)
    from zephyr_jax.loop import fit  # after the config: its errors come at once
    from zephyr_jax.run_parts import pack

    if args.pack_for is not None:
        if args.pack_for < 1:
            raise ValueError(f"--pack_for={args.pack_for} must be at least 1")
        pack(config, args.pack_for)
    else:
        fit(config, args.workdir)
