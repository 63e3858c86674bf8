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
from pathlib import Path

from absl import logging

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    model = "Hugging Face folder or hub id, GGUF, checkpoint or workdir"
    add("--model", required=True, help=model)
    add("--dataset", required=True, help='such as ultrafeedback/binarized; several: "A, B"')
    add("--data_dir", default="data", help="where prepare_data put the sets (data)")
    add("--split", default="", help="default: the set's held-out split")
    add("--limit", type=int, metavar="N", help="only the first N records of each set")
    add("--reference", metavar="MODEL", help="reference for implicit rewards and KL (pairs only)")
    add("--beta", type=float, help="scale of the implicit rewards (0.1)")
    add("--seq_len", type=int, default=2048, help="tokens in a row (2048)")
    add("--rows", type=int, help="rows in a batch (8, rounded up to data x fsdp)")
    add(
        "--max_length",
        type=int,
        help="tokens of a dialogue (seq_len), of a prompt and its longer answer (half of it); no "
        "more than the model has positions",
    )
    add("--max_prompt_length", type=int, help="tokens of a longer pair's prompt (max_length / 2)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    flags.add_mesh(parser)
    add("--bootstrap", type=int, default=1000, metavar="SAMPLES", help="bootstrap samples (1000)")
    add("--seed", type=int, default=0, help="random seed of the bootstrap")
    add("--output", metavar="FILE.json", help="the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    _check(args)
    from zephyr_jax.evaluation.evaluate import Settings, evaluate
    from zephyr_jax.evaluation.summary import result_table
    from zephyr_jax.storage import write_atomic

    names = [field.name for field in dataclasses.fields(Settings)]
    with flags.all_devices(args.tensor, args.fsdp):
        result = evaluate(Settings(**{name: getattr(args, name) for name in names}))
    sys.stdout.write(f"{result_table(result)}\n")
    if args.output:
        path = Path(args.output).expanduser()
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        logging.info("%s", path)
    else:
        sys.stdout.write(f"\n{json.dumps(result)}\n")


def _check(args: argparse.Namespace) -> None:
    """Raises a ValueError if a flag is wrong by itself."""
    least = {"limit": 1, "rows": 1, "max_length": 2, "max_prompt_length": 1, "seq_len": 2}
    for name, smallest in (least | {"bootstrap": 100, "seed": 0}).items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name}={value} must be at least {smallest}")
    if args.beta is not None and not 0 < args.beta < float("inf"):
        raise ValueError(f"--beta={args.beta} must be a number above 0")
    if args.beta is not None and args.reference is None:
        raise ValueError(f"--beta={args.beta} scales implicit rewards; give --reference=MODEL too")
    if args.output:
        path = Path(args.output).expanduser()
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"--output={path} must name a file in an existing folder")
