"""Ports weights between Hugging Face folders and this project's checkpoints.

import SRC DST: a Hugging Face folder or hub id becomes a checkpoint folder.
export SRC DST: a checkpoint, workdir or Hugging Face folder becomes a Hugging Face folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from absl import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", help="workdir, checkpoint, Hugging Face folder or hub id")
    parser.add_argument("destination", help="a folder that does not exist yet")
    parser.add_argument("--format", default="hf", choices=("hf",), help="of an export")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of tensors"
    )
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="size of one weight file")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from zephyr_jax.checkpoint import load_model, save_model
    from zephyr_jax.interop.huggingface import export_hf

    model = load_model(args.source)
    if args.direction == "import":
        save_model(model, args.destination)
    else:
        export_hf(
            model.cfg,
            model.params,
            model.tokenizer,
            args.destination,
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            card=model_card(args.source, model.lineage),
        )
    logging.info("%s is in %s", args.source, args.destination)


def model_card(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """What the exported model card says of where the model comes from."""
    from zephyr_jax.metrics import read_metrics

    config = lineage.get("config")
    if not config:
        return {"lineage": lineage["lineage"]}
    data = config["data"]
    card: dict[str, Any] = {
        "recipe": config,
        "data": {f"{data['dataset']} {data['train_split']}": lineage["dataset_digest"]}
        | {"packed set": lineage["packed"]},
        "lineage": lineage["lineage"],
    }
    here = {"split": "eval", "step": lineage["step"]}
    rows = [
        row for row in read_metrics(Path(source) / "metrics.jsonl") if here.items() <= row.items()
    ]
    if rows:
        card["metrics"] = {k: v for k, v in rows[-1].items() if k not in ("split", "step")}
    return card
