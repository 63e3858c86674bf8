"""Measures a model: on prepared sets, and by the benchmarks that chat models are compared with.

docs/evaluation.md defines every number. Each kind has its own flags: evaluate KIND --help.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from absl import logging

from zephyr_jax.cli import flags

_KINDS = {
    "sets": "perplexity of dialogues, and how often the chosen answer of a pair wins",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the kinds and their flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(_KINDS))
    for kind, declare in (("sets", _add_sets),):
        words = {"help": _KINDS[kind], "description": declare.__doc__, "allow_abbrev": False}
        declare(kinds.add_parser(kind, **words))


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    {"sets": _sets}[args.kind](args)


def _add_sets(parser: argparse.ArgumentParser) -> None:
    """Scores a prepared set by a model: perplexity, and of pairs how often the chosen answer wins.

    Dialogues give nats per target token and perplexity; pairs log-likelihood accuracy, and with
    --reference implicit rewards, margins and the KL divergence. Every number has a 95% bootstrap
    interval. All of it goes to --output as JSON; without that it is the last line on stdout.
    """
    add, at_least = parser.add_argument, flags.at_least
    flags.add_model(parser)
    add("--dataset", required=True, help='such as ultrafeedback/binarized; several: "A, B"')
    flags.add_data_dir(parser, default="data", help="where prepare_data put the sets (data)")
    flags.add_split(parser, default="", help="default: the set's held-out split")
    flags.add_limit(parser, "only the first N records of each set")
    add("--reference", metavar="MODEL", help="reference for implicit rewards and KL (pairs only)")
    add("--beta", type=float, help="scale of the implicit rewards (0.1)")
    _add_shape(parser)
    longest = "tokens of a dialogue (seq_len), or of a prompt and its longer answer (half of it)"
    add("--max_length", type=at_least(2), help=longest)
    prompt = "tokens of a longer pair's prompt (max_length / 2)"
    add("--max_prompt_length", type=at_least(1), help=prompt)
    samples = "bootstrap samples (1000)"
    add("--bootstrap", type=at_least(100), default=1000, metavar="SAMPLES", help=samples)
    flags.add_output(parser, "the numbers as JSON")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """Declares the size of a batch of packed rows, and the mesh."""
    at_least = flags.at_least
    parser.add_argument("--seq_len", type=at_least(2), default=2048, help="tokens in a row (2048)")
    batch = "rows in a batch (8, rounded up to data x fsdp)"
    flags.add_rows(parser, type=at_least(1), help=batch)
    flags.add_mesh(parser)


def _sets(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation.evaluate import Settings, evaluate, result_table

    names = [field.name for field in dataclasses.fields(Settings)]
    with flags.all_devices(args.tensor, args.fsdp):
        result = evaluate(Settings(**{name: getattr(args, name) for name in names}))
    sys.stdout.write(f"{result_table(result)}\n")
    _write(args, result)


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes the result to --output, or else as the last line on stdout."""
    from zephyr_jax.storage import write_atomic

    if args.output:
        logging.info("%s", write_atomic(args.output, json.dumps(result, indent=1) + "\n"))
    else:
        sys.stdout.write(f"\n{json.dumps(result)}\n")
