"""Scores a prepared set by a model: perplexity, and of pairs how often the chosen answer wins.

Dialogues give nats per target token and perplexity; pairs log-likelihood accuracy, and with
--reference implicit rewards, margins and the KL divergence. Every number has a 95% bootstrap
interval; docs/evaluation.md defines them. All of it goes to --output as JSON; without that it is
the last line on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from absl import logging

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add, at_least = parser.add_argument, flags.at_least
    flags.add_model(parser)
    add("--dataset", required=True, help='such as ultrafeedback/binarized; several: "A, B"')
    add("--data_dir", default="data", help="where prepare_data put the sets (data)")
    add("--split", default="", help="default: the set's held-out split")
    add("--limit", type=at_least(1), metavar="N", help="only the first N records of each set")
    add("--reference", metavar="MODEL", help="reference for implicit rewards and KL (pairs only)")
    add("--beta", type=float, help="scale of the implicit rewards (0.1)")
    add("--seq_len", type=at_least(2), default=2048, help="tokens in a row (2048)")
    add("--rows", type=at_least(1), help="rows in a batch (8, rounded up to data x fsdp)")
    longest = "tokens of a dialogue (seq_len), or of a prompt and its longer answer (half of it)"
    add("--max_length", type=at_least(2), help=longest)
    prompt = "tokens of a longer pair's prompt (max_length / 2)"
    add("--max_prompt_length", type=at_least(1), help=prompt)
    flags.add_mesh(parser)
    samples = "bootstrap samples (1000)"
    add("--bootstrap", type=at_least(100), default=1000, metavar="SAMPLES", help=samples)
    add("--output", type=flags.output_file, metavar="FILE.json", help="the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from zephyr_jax.evaluation.evaluate import Settings, evaluate, result_table
    from zephyr_jax.storage import write_atomic

    names = [field.name for field in dataclasses.fields(Settings)]
    with flags.all_devices(args.tensor, args.fsdp):
        result = evaluate(Settings(**{name: getattr(args, name) for name in names}))
    sys.stdout.write(f"{result_table(result)}\n")
    if args.output:
        logging.info("%s", write_atomic(args.output, json.dumps(result, indent=1) + "\n"))
    else:
        sys.stdout.write(f"\n{json.dumps(result)}\n")
