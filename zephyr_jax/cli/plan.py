"""Compiles a run for TPU slices that are not here: does it fit, how long does a step take, and why.

    plan --config=zephyr_7b_sft --topology=v5e:4x4,v5p:2x2x4,2*v5e:8x8

The program is the training step itself, compiled by libtpu (extra plan); docs/pods.md says how the
estimate is made and what it leaves out. Any field of the config can be set from here:
--config.train.micro_batches=2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    add("--config", required=True, help="config files or names of recipes, separated by commas")
    add("--topology", required=True, help="slices, separated by commas: v5e:4x4, 2*v5e:8x8")
    add("--rows", type=int, help="rows of a batch of pairs (as many as real pairs fill)")
    add("--examples", type=int, help="rows or pairs of an epoch (as published, if the set is)")
    auto = "mesh and micro-batches by a rule of thumb, smaller portions where they do not fit"
    add("--auto", action="store_true", help=auto)
    add("--search", type=int, metavar="N", help="try other layouts too and show the N best")
    add(
        "--prices",
        metavar="FILE.json",
        help='{"date": ..., "currency": ..., "v5e": 1.2}: a chip-hour',
    )
    add("--processes", type=int, default=os.cpu_count(), help="that compile at once")
    add("--cache", metavar="DIR", help="of compiled programs (~/.cache/zephyr_jax/plans)")
    add("--output", metavar="FILE.json", help="all numbers")
    add("--figure", metavar="FILE.svg", help="memory and time in one picture")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ValueError: if a flag, the config or a topology is not right, or libtpu is not there.
    """
    from zephyr_jax.planning.topologies import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    _check(args)
    from zephyr_jax.config.run import load_config
    from zephyr_jax.planning.plans import make_plans
    from zephyr_jax.planning.show import figure, table
    from zephyr_jax.planning.topologies import parse_topology

    configs = [load_config(name.strip(), args.overrides) for name in args.config.split(",")]
    topologies = [parse_topology(name) for name in args.topology.split(",")]
    cache = Path(args.cache or "~/.cache/zephyr_jax/plans").expanduser()
    prices = _prices(args.prices)
    plans = make_plans(configs, topologies, args, cache)
    for plan in plans:
        family = plan["topology"].split(":")[0].split("*")[-1]
        if family in prices and "chip_hours" in plan:
            plan["cost"] = prices[family] * plan["chip_hours"]
    sys.stdout.write(table(plans))
    if prices:
        sys.stdout.write(f"\nPrices of {prices['date']} in {prices['currency']}.\n")
    if args.output:
        _write(Path(args.output), json.dumps(plans, indent=1) + "\n")
    if args.figure:
        figure(plans, Path(args.figure).expanduser())
        logging.info("%s", args.figure)
    if not any(plan.get("fits") for plan in plans):
        raise SystemExit(1)


def _check(args: argparse.Namespace) -> None:
    for name in ("rows", "examples", "search", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    for name in ("output", "figure"):
        path = getattr(args, name) and Path(getattr(args, name)).expanduser()
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name}={path}: {path.absolute().parent} is no folder")


def _prices(path: str | None) -> dict[str, Any]:
    """Currency, date and price of a chip-hour by family."""
    if not path:
        return {}
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--prices={path}: no such file")
    try:
        found = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--prices={path} is no JSON: {error}") from error
    lacking = {"date", "currency"} - set(found if isinstance(found, dict) else {})
    if lacking:
        raise ValueError(f"--prices={path} lacks {', '.join(sorted(lacking))}")
    return found


def _write(path: Path, text: str) -> None:
    path = path.expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
    logging.info("%s", path)
