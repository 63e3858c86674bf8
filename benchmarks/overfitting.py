"""Three epochs of DPO on few real pairs, drawn with the curve of the published zephyr-7b-beta.

    python benchmarks/overfitting.py --init=CHECKPOINT --source=PAIRS.jsonl
        [--published=CURVE.csv] [--workdir=overfitting_run] [--out=docs/overfitting.svg]

What there is to see: the training loss drops where an epoch begins, for the pairs have been seen
before; the held-out loss turns upwards while the held-out accuracy does not fall; and the
log-probs of chosen answers fall together with those of rejected ones. PAIRS.jsonl has the columns
of UltraFeedback binarized. CURVE.csv has the columns epoch, train_loss, val_loss,
rewards_accuracy, logps_chosen and logps_rejected. A run that was stopped goes on where it was;
one that is done is only drawn.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

import zephyr_jax as zj
from zephyr_jax.config import run as parts
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.data.prepare.prepare import Selection, prepare
from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.training.loop import fit

EPOCHS, BATCH = 3, 16
_PANELS = ("loss", "held-out accuracy", "held-out log-probs, change")
Curves = dict[str, tuple[list[float], list[float]]]  # name -> epochs passed, values


def config_of(args: argparse.Namespace) -> parts.RunConfig:
    """The run: the recipe of zephyr-7b-beta at the sizes of a small model."""
    model = zj.load_model(args.init).cfg
    steps = max(1, args.pairs // BATCH)
    return parts.RunConfig(
        name="overfitting",
        seed=0,
        init=str(args.init),
        model=model,
        chat=parts.ChatConfig(
            bos=True,
            append_eos=False,
            empty_system=False,
            parse_special=False,
            loss_on="assistant",
            score_header=False,
        ),
        data=parts.DataConfig(
            data_dir=str(args.workdir / "data"),
            dataset="preferences/own",
            splits=("train_prefs", "test_prefs"),
            tokenizer="",
            seq_len=512,
            packing="best_fit",
        ),
        optim=parts.OptimConfig(
            name="adamw",
            peak_lr=args.peak_lr,
            schedule="linear",
            warmup_ratio=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            max_grad_norm=1.0,
        ),
        train=parts.TrainConfig(
            epochs=EPOCHS,
            max_steps=0,
            batch_size=BATCH,
            micro_batches=4,
            eval_every=-(-steps // 2),
            checkpoint_every=steps,
            keep_checkpoints=1,
            log_every=1,
            remat="none",
            reduce_dtype="float32",
            attention="auto",
        ),
        mesh=parts.MeshConfig(1, 1, 1),
        dpo=DpoConfig(beta=0.1, reference="precomputed", max_length=384, max_prompt_length=128),
    )


def make_set(args: argparse.Namespace) -> None:
    """Prepares the first pairs of the file, every fourth of them held out."""
    if (args.workdir / "data" / "preferences").exists():
        return
    lines = args.source.read_text().splitlines()
    rows = [json.loads(line) for line in lines[: args.pairs + args.pairs // 3]]
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    raw = args.workdir / "pairs.jsonl"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text("".join(json.dumps(row) + "\n" for row in kept))
    prepare("preferences", raw, args.workdir / "data", selection=Selection(holdout=0.25), workers=1)


def our_curves(path: Path) -> Curves:
    """The curves of metrics.jsonl; the training loss as means of a sixth of an epoch."""
    rows = read_metrics(path)
    steps_an_epoch = max(row["step"] for row in rows) / EPOCHS
    train = [row for row in rows if row["split"] == "train"]
    some = max(1, round(steps_an_epoch / 6))
    blocks = [train[at : at + some] for at in range(0, len(train), some)]
    held = [row for row in rows if row["split"] == "eval"]

    def of(name: str, first: int = 0) -> tuple[list[float], list[float]]:
        some = held[first:]
        return [row["step"] / steps_an_epoch for row in some], [row[f"eval_{name}"] for row in some]

    ends = [block[-1]["step"] / steps_an_epoch for block in blocks]
    return {
        "training loss": (ends, [sum(r["loss"] for r in block) / len(block) for block in blocks]),
        "held-out loss": of("loss"),
        "held-out accuracy": of("rewards/accuracies", first=1),  # at step 0 every pair is a tie
        "chosen": of("drift/chosen"),
        "rejected": of("drift/rejected"),
    }


def published_curves(path: Path) -> Curves:
    """The curves of the published run; log-probs as the change since its first evaluation."""
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    at = [float(row["epoch"]) for row in rows]

    def of(name: str, drift: bool = False) -> tuple[list[float], list[float]]:
        values = [float(row[name]) for row in rows]
        return at, [value - values[0] * drift for value in values]

    return {
        "training loss": of("train_loss"),
        "held-out loss": of("val_loss"),
        "held-out accuracy": of("rewards_accuracy"),
        "chosen": of("logps_chosen", drift=True),
        "rejected": of("logps_rejected", drift=True),
    }


def draw(columns: dict[str, Curves], path: Path) -> None:
    """Writes one column of panels for every run."""
    colors = {"training loss": "tab:gray", "chosen": "tab:blue", "rejected": "tab:orange"}
    with mpl.rc_context({"svg.hashsalt": "overfitting", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(4.2 * len(columns), 6.6), layout="constrained")
        grid = figure.subplots(len(_PANELS), len(columns), sharex=True, squeeze=False)
        for column, (title, curves) in enumerate(columns.items()):
            panels = (("training loss", "held-out loss"), ("held-out accuracy",))
            for row, names in enumerate((*panels, ("chosen", "rejected"))):
                axes = grid[row, column]
                for name in names:
                    color = colors.get(name, "tab:red")
                    axes.plot(*curves[name], ".-", ms=4, lw=1, color=color, label=name)
                for epoch in range(1, EPOCHS):
                    axes.axvline(epoch, color="0.8", lw=0.8, zorder=0)
                axes.set_ylabel(_PANELS[row])
                if len(names) > 1:
                    axes.legend()
            grid[0, column].set_title(title)
            grid[-1, column].set_xlabel("epochs")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Trains where there is something left to train, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--source", type=Path, required=True, help="JSON lines of pairs")
    parser.add_argument("--published", type=Path, help="the published curve, a CSV")
    parser.add_argument("--workdir", type=Path, default=Path("overfitting_run"))
    parser.add_argument("--out", type=Path, default=Path("docs/overfitting.svg"))
    parser.add_argument("--pairs", type=int, default=192, help="pairs to train on")
    parser.add_argument("--peak_lr", type=float, default=6e-5)
    args = parser.parse_args()
    make_set(args)
    config = config_of(args)
    fit(config, args.workdir / "run")
    columns = {args.init.name: our_curves(args.workdir / "run" / "metrics.jsonl")}
    if args.published:
        columns["zephyr-7b-beta, as published"] = published_curves(args.published)
    draw(columns, args.out)


if __name__ == "__main__":
    main()
