"""Compiles a run for TPU slices without having them: does it fit, how long does a step take?

    plan --config=zephyr_7b_sft --topology=v5e:4x4,v5p:2x2x4,2*v5e:8x8
    plan --config=zephyr_7b_sft --topology=v5e:2x4 --sample 8 64 256

The program is the training step itself, or with --sample prefill and decoding of `generate`,
compiled by libtpu (extra plan); docs/pods.md explains the estimate and what it leaves out. Compiled
programs are kept in ~/.cache/zephyr_jax/plans. Flags set any field of the config:
--config.train.micro_batches=2
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from absl import logging
from tqdm import tqdm

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, at_least = parser.add_argument, flags.at_least
    flags.add_config(parser, "config files or names of recipes, comma-separated")
    add("--topology", required=True, help="slices, comma-separated: v5e:4x4, 2*v5e:8x8")
    rows = "rows of a batch of pairs (default: as many as real pairs fill)"
    flags.add_rows(parser, type=at_least(1), help=rows)
    examples = "rows or pairs per epoch (default: as published, if known); with --sample replies"
    add("--examples", type=at_least(1), help=examples)
    auto = "choose mesh and micro-batches, and halve the micro-batches until the run fits"
    add("--auto", action="store_true", help=auto)
    sample = "plan sampling instead, with these numbers of replies at once"
    add("--sample", type=at_least(1), nargs="+", metavar="N", help=sample)
    lengths = "tokens of a prompt and of a reply (default: 256 512)"
    add("--lengths", type=at_least(1), nargs=2, default=(256, 512), metavar="N", help=lengths)
    processes = "number of parallel compilations"
    add("--processes", type=at_least(1), default=os.cpu_count(), help=processes)
    flags.add_output(parser, "write all numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Runs the command; `SystemExit(1)` if nothing fits."""
    from zephyr_jax.planning.compiling import ENVIRONMENT, parse_topology

    os.environ.update(ENVIRONMENT)
    from zephyr_jax.config.run import load_config
    from zephyr_jax.planning.plans import PlanOptions, make_plans, sample_plan, sample_table, table
    from zephyr_jax.storage import write_atomic

    configs = [load_config(name.strip(), args.overrides) for name in args.config.split(",")]
    topologies = [parse_topology(name) for name in args.topology.split(",")]
    options = PlanOptions(args.rows, args.examples, args.auto, args.processes)
    if args.sample:
        each = [(run, where, n) for run in configs for where in topologies for n in args.sample]
        plans = [sample_plan(*case, tuple(args.lengths), args.examples) for case in tqdm(each)]
        sys.stdout.write(sample_table(plans))
    else:
        plans = make_plans(configs, topologies, options)
        sys.stdout.write(table(plans))
    if args.output:
        logging.info("%s", write_atomic(args.output, json.dumps(plans, indent=1) + "\n"))
    if not any(plan.get("fits") for plan in plans):
        raise SystemExit(1)
