"""The whole pipeline on an embedded world: raw records, TFDS, SFT, DPO, Hugging Face folder, chat.

Every stage leaves its result under --workdir. A stage whose result exists is skipped, so a run that
was stopped at any moment continues when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.demo import corpus, heldout, vocabulary
from zephyr_jax.inference.generate import generate
from zephyr_jax.models.mistral import init_params
from zephyr_jax.reports.demo import write_demo_report
from zephyr_jax.storage import atomic_path, write_atomic
from zephyr_jax.training.card import model_card_fields
from zephyr_jax.training.loop import fit
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checkpoint import Model, load_model
from zephyr_jax.weights.huggingface import export_hf, load_hf

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
    configs = {stage: demo_config(stage, root, **settings) for stage in ("sft", "dpo")}
    if not (root / "raw").is_dir():
        with _timed(root, "corpus"):
            write_raw(root / "raw", args.seed, configs["sft"].model.vocab_size)
    for name in SETS:
        with _timed(root, "prepare"):
            prepare(name, root / "raw" / name, root / "data", "raw")
    for stage, config in configs.items():
        with _timed(root, stage):
            fit(config, root / stage)
    if not (root / "hf").is_dir():
        with _timed(root, "export"):
            export(root / "dpo", root / "hf")
    if not (root / "results.json").is_file():
        with _timed(root, "judge"):
            _write_json(root / "results.json", judge(root, configs["sft"]))
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


def demo_config(stage: str, root: Path, short: bool, seed: int) -> RunConfig:
    """The recipe `demo_sft` or `demo_dpo` with its inputs under the demo's folder."""
    config = load_config(f"demo_{stage}")
    data = dataclasses.replace(config.data, data_dir=str(root / "data"))
    if stage == "sft":
        data = dataclasses.replace(data, tokenizer=str(root / "raw" / "tokenizer"))
    else:
        config = dataclasses.replace(config, init=str(root / "sft"))
    if short:
        train = dataclasses.replace(config.train, max_steps=SHORT_STEPS)
        config = dataclasses.replace(config, train=train)
    return dataclasses.replace(config, data=data, seed=seed)


def write_raw(raw: Path, seed: int, vocab_size: int) -> None:
    """Raw records of both sets, and a tokenizer trained on them."""
    with atomic_path(raw) as folder:
        corpus.write_ultrachat(folder / "ultrachat", DIALOGUES, seed)
        corpus.write_ultrafeedback(folder / "ultrafeedback", PROMPTS, seed)
        lines = vocabulary.tokenizer_lines(*(folder / name for name in SETS))
        vocabulary.train_tokenizer(lines, folder / "tokenizer" / "tokenizer.model", vocab_size)


def export(workdir: Path, folder: Path) -> None:
    """A Hugging Face folder of a run's model, read back and compared bit for bit."""
    model = load_model(workdir)
    assert model.tokenizer is not None
    card = model_card_fields(workdir, model.lineage)
    export_hf(model.cfg, model.params, model.tokenizer, folder, dtype="float32", card=card)
    read_back = jax.tree.leaves(load_hf(folder)[1])
    for a, b in zip(jax.tree.leaves(model.params), read_back, strict=True):
        np.testing.assert_array_equal(a, b)


def judge(root: Path, config: RunConfig) -> dict[str, Any]:
    """Exact answers of the base, SFT and DPO models to held-out questions, by kind and in full."""
    questions = heldout.heldout_questions(config.seed)
    tok = Tokenizer.from_folder(root / "raw" / "tokenizer")
    base = Model(config.model, init_params(config.model, jax.random.key(config.seed)), tok, {})
    # The aligned model is the exported one, which others would load.
    models = {"base": base, "sft": load_model(root / "sft"), "dpo": load_model(root / "hf")}
    prompts = [question["messages"] for question in questions]
    replies = {
        name: generate(model.cfg, model.params, tok, prompts, max_new_tokens=48)
        for name, model in models.items()
    }
    rows = [
        question | {name: texts[i] for name, texts in replies.items()}
        for i, question in enumerate(questions)
    ]

    def rate(name: str, kind: str | None = None) -> float:
        exact = [row[name].strip() in row["answers"] for row in rows if kind in (None, row["kind"])]
        return sum(exact) / len(exact)

    kinds = sorted({question["kind"] for question in questions})
    evals = [row for row in read_metrics(root / "dpo" / "metrics.jsonl") if row["split"] == "eval"]
    return {
        "exact": {name: rate(name) for name in replies},
        "exact_by_kind": {kind: {name: rate(name, kind) for name in replies} for kind in kinds},
        "preference_accuracy": {
            "sft_log_likelihood": evals[0]["eval_logps/accuracies"],
            "dpo_implicit_reward": evals[-1]["eval_rewards/accuracies"],
        },
        "questions": rows,
    }


def _summary(results: dict[str, Any], page: Path) -> str:
    exact, accuracy = results["exact"], results["preference_accuracy"]
    rates = ", ".join(f"{name} {100 * value:.0f}%" for name, value in exact.items())
    lines = [
        "",
        "Everything here is synthetic: a small world that the package makes up.",
        f"exact answers to held-out questions: {rates}",
        "held-out preferences: log-likelihood of the SFT model "
        f"{100 * accuracy['sft_log_likelihood']:.0f}%, implicit reward after DPO "
        f"{100 * accuracy['dpo_implicit_reward']:.0f}%",
        "",
    ]
    first_of_kind = {row["kind"]: row for row in reversed(results["questions"])}
    for row in sorted(first_of_kind.values(), key=results["questions"].index)[:3]:
        lines.append(f"you:   {row['messages'][-1]['content']}")
        lines += [f"base:  {row['base']!r}", f"model: {row['dpo']}", ""]
    return "\n".join([*lines, f"report: {page}", ""])
