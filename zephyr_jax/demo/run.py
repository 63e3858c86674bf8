"""The whole pipeline on an embedded world: raw records, TFDS, SFT, DPO, Hugging Face folder, chat.

Every stage leaves its result under --workdir. A stage whose result exists is skipped, so a run that
was stopped at any moment continues when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.demo import corpus, vocabulary
from zephyr_jax.inference.generate import generate
from zephyr_jax.models.mistral import init_params
from zephyr_jax.reports.demo import write_demo_report
from zephyr_jax.storage import atomic_path, write_atomic
from zephyr_jax.training.loop import fit
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.workdir import model_card_fields
from zephyr_jax.weights.checkpoint import Model
from zephyr_jax.weights.huggingface import export_hf
from zephyr_jax.weights.sources import load_model

DIALOGUES, PROMPTS, SHORT_STEPS = 5000, 1500, 20
SETS = ("ultrachat", "ultrafeedback")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--workdir", default="demo_run", help="folder for everything (demo_run)")
    short = f"only {SHORT_STEPS} steps a stage: shows the pipeline, not what the model can learn"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--seed", type=int, default=0, help="random seed")


def run(args: argparse.Namespace) -> None:
    """Runs the stages in order.

    Raises:
        ValueError: if the folder holds a demo with other settings.
    """
    root, settings = Path(args.workdir), {"short": args.short, "seed": args.seed}
    path = root / "demo.json"
    if path.is_file() and (found := json.loads(path.read_text())) != settings:
        raise ValueError(
            f"{root} holds a demo with {found}, this one has {settings}; take another --workdir or "
            "remove it"
        )
    _write_json(path, settings)
    configs = {stage: _config(stage, root, **settings) for stage in ("sft", "dpo")}
    if not (root / "raw").is_dir():
        with _timed(root, "corpus"), atomic_path(root / "raw") as raw:
            corpus.write_ultrachat(raw / "ultrachat", DIALOGUES, args.seed)
            corpus.write_ultrafeedback(raw / "ultrafeedback", PROMPTS, args.seed)
            lines = vocabulary.tokenizer_lines(*(raw / name for name in SETS))
            model_file = raw / "tokenizer" / "tokenizer.model"
            vocabulary.train_tokenizer(lines, model_file, configs["sft"].model.vocab_size)
    for name in SETS:
        with _timed(root, "prepare"):
            prepare(name, root / "raw" / name, root / "data", "raw")
    for stage, config in configs.items():
        with _timed(root, stage):
            fit(config, root / stage)
    if not (root / "hf").is_dir():
        with _timed(root, "export"):
            model = load_model(root / "dpo")
            card = model_card_fields(root / "dpo", model.lineage)
            tok = model.tokenizer
            export_hf(model.cfg, model.params, tok, root / "hf", dtype="float32", card=card)
    if not (root / "results.json").is_file():
        with _timed(root, "judge"):
            _write_json(root / "results.json", _judge(root, configs["sft"]))
    page = write_demo_report(root)
    sys.stdout.write(_summary(json.loads((root / "results.json").read_text()), page))


@contextlib.contextmanager
def _timed(root: Path, stage: str) -> Iterator[None]:
    """Adds the stage's seconds to `timing.json`."""
    logging.info("stage %s", stage)
    start = time.monotonic()
    try:
        yield
    finally:
        path = root / "timing.json"
        seconds = json.loads(path.read_text()) if path.is_file() else {}
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 2)
        _write_json(path, seconds)


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False))


def _config(stage: str, root: Path, short: bool, seed: int) -> RunConfig:
    """The recipe `demo_sft` or `demo_dpo` with its inputs under the demo's folder."""
    inputs = {"sft": ("data.tokenizer", root / "raw" / "tokenizer"), "dpo": ("init", root / "sft")}
    name, path = inputs[stage]
    overrides = [f"data.data_dir={root / 'data'}", f"{name}={path}", f"seed={seed}"]
    if short:
        overrides.append(f"train.max_steps={SHORT_STEPS}")
    return load_config(f"demo_{stage}", [f"--config.{override}" for override in overrides])


def _judge(root: Path, config: RunConfig) -> dict[str, Any]:
    """Exact answers of the base, SFT and DPO models to held-out questions, by kind and in full."""
    questions = corpus.heldout_questions(config.seed)
    tok = Tokenizer.from_folder(root / "raw" / "tokenizer")
    base = Model(config.model, init_params(config.model, jax.random.key(config.seed)), tok, {})
    # The aligned model is the exported one, which others would load.
    models = {"base": base, "sft": load_model(root / "sft"), "dpo": load_model(root / "hf")}
    rows = [dict(question) for question in questions]
    for name, model in models.items():
        prompts = [question["messages"] for question in questions]
        replies = generate(model.cfg, model.params, tok, prompts, max_new_tokens=48)
        for row, reply in zip(rows, replies, strict=True):
            row[name] = reply

    def rates(rows: list[dict[str, Any]]) -> dict[str, float]:
        right = {name: [row[name].strip() in row["answers"] for row in rows] for name in models}
        return {name: sum(exact) / len(exact) for name, exact in right.items()}

    evals = [row for row in read_metrics(root / "dpo" / "metrics.jsonl") if row["split"] == "eval"]
    kinds = sorted({row["kind"] for row in rows})
    return {
        "exact": rates(rows),
        "exact_by_kind": {kind: rates([r for r in rows if r["kind"] == kind]) for kind in kinds},
        "preference_accuracy": {
            "sft_log_likelihood": evals[0]["eval_logps/accuracies"],
            "dpo_implicit_reward": evals[-1]["eval_rewards/accuracies"],
        },
        "questions": rows,
    }


def _summary(results: dict[str, Any], page: Path) -> str:
    accuracy = results["preference_accuracy"]
    rates = ", ".join(f"{name} {100 * value:.0f}%" for name, value in results["exact"].items())
    lines = [
        "",
        "Everything here is synthetic: a small world that the package makes up.",
        f"exact answers to held-out questions: {rates}",
        "held-out preferences: log-likelihood of the SFT model "
        f"{100 * accuracy['sft_log_likelihood']:.0f}%, implicit reward after DPO "
        f"{100 * accuracy['dpo_implicit_reward']:.0f}%",
        "",
    ]
    for row in results["questions"][::20][:3]:  # the first of each of three kinds
        lines.append(f"you:   {row['messages'][-1]['content']}")
        lines += [f"base:  {row['base']!r}", f"model: {row['dpo']}", ""]
    return "\n".join([*lines, f"report: {page}", ""])
