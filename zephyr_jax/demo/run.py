"""The whole road on the embedded default: raw records, TFDS, SFT, DPO, Hugging Face folder, chat.

Every stage leaves its result under --workdir, and a run that was stopped at any moment goes on
there when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
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
from zephyr_jax.training.card import model_card_fields
from zephyr_jax.training.loop import fit
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checkpoint import Model, load_model
from zephyr_jax.weights.huggingface import export_hf, load_hf

DIALOGUES, PROMPTS, SHORT_STEPS = 5000, 1500, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--workdir", default="demo_run", help="where everything goes")
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"{SHORT_STEPS} steps a stage: shows the road, not skill",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    demo = _Demo(Path(args.workdir), args.short, args.seed)
    demo.corpus()
    demo.train("sft")
    demo.train("dpo")
    demo.export()
    demo.judge()
    page = write_demo_report(demo.root)
    results = json.loads((demo.root / "results.json").read_text())
    sys.stdout.write(_summary(results, page))


class _Demo:
    """The stages; each does nothing where its result is there."""

    def __init__(self, root: Path, short: bool, seed: int):
        self.root, self.short, self.seed = root, short, seed
        root.mkdir(parents=True, exist_ok=True)
        asked = {"short": short, "seed": seed}
        path = root / "demo.json"
        if path.is_file() and json.loads(path.read_text()) != asked:
            raise ValueError(
                f"{root} holds a demo made with {json.loads(path.read_text())}, asked is {asked}; "
                f"take another --workdir or remove it"
            )
        _write_json(path, asked)

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """Runs a stage and adds its seconds to `timing.json`."""
        logging.info("stage %s", stage)
        start = time.monotonic()
        try:
            return work()
        finally:
            path = self.root / "timing.json"
            seconds = json.loads(path.read_text()) if path.is_file() else {}
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 2)
            _write_json(path, seconds)

    def corpus(self) -> None:
        """Raw records, a tokenizer trained on them, and the two TFDS sets."""
        raw = self.root / "raw"
        if not raw.is_dir():
            self.timed("corpus", lambda: self._write_raw(raw))
        data = self.root / "data"
        for name in ("ultrachat", "ultrafeedback"):
            self.timed("prepare", lambda name=name: prepare(name, raw / name, data, "raw"))

    def _write_raw(self, raw: Path) -> None:
        temporary = raw.with_name("raw.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for name in ("ultrachat", "ultrafeedback"):
            (temporary / name).mkdir(parents=True)
        corpus.write_ultrachat(temporary / "ultrachat", DIALOGUES, self.seed)
        corpus.write_ultrafeedback(temporary / "ultrafeedback", PROMPTS, self.seed)
        lines = vocabulary.tokenizer_lines(temporary / "ultrachat", temporary / "ultrafeedback")
        (temporary / "tokenizer").mkdir()
        vocab = self.config("sft").model.vocab_size
        vocabulary.train_tokenizer(lines, temporary / "tokenizer" / "tokenizer.model", vocab)
        temporary.rename(raw)

    def config(self, stage: str) -> RunConfig:
        """The recipe `demo_sft` or `demo_dpo`, placed under this demo's folder."""
        config = load_config(f"demo_{stage}")
        data = dataclasses.replace(config.data, data_dir=str(self.root / "data"))
        if stage == "sft":
            data = dataclasses.replace(data, tokenizer=str(self.root / "raw" / "tokenizer"))
        else:
            config = dataclasses.replace(config, init=str(self.root / "sft"))
        if self.short:
            train = dataclasses.replace(config.train, max_steps=SHORT_STEPS)
            config = dataclasses.replace(config, train=train)
        return dataclasses.replace(config, data=data, seed=self.seed)

    def train(self, stage: str) -> None:
        """SFT or DPO."""
        self.timed(stage, lambda: fit(self.config(stage), self.root / stage))

    def export(self) -> None:
        """A Hugging Face folder of the DPO model, read back and compared bit for bit."""
        if (self.root / "hf").is_dir():
            return

        def work() -> None:
            model = load_model(self.root / "dpo")
            assert model.tokenizer is not None
            card = model_card_fields(self.root / "dpo", model.lineage)
            folder = self.root / "hf"
            export_hf(model.cfg, model.params, model.tokenizer, folder, dtype="float32", card=card)
            back = jax.tree.leaves(load_hf(folder)[1])
            for a, b in zip(jax.tree.leaves(model.params), back, strict=True):
                np.testing.assert_array_equal(a, b)

        self.timed("export", work)

    def judge(self) -> None:
        """Exact answers of the base, SFT and DPO models to held-out questions: `results.json`."""
        if (self.root / "results.json").is_file():
            return

        def work() -> None:
            questions = heldout.heldout_questions(self.seed)
            config = self.config("sft")
            tok = Tokenizer.from_folder(self.root / "raw" / "tokenizer")
            base = init_params(config.model, jax.random.key(config.seed))
            models = {
                "base": Model(config.model, base, tok, {}),
                "sft": load_model(self.root / "sft"),
            }
            # The aligned model is the one that somebody else would load.
            models["dpo"] = load_model(self.root / "hf")
            replies = {name: _answers(model, tok, questions) for name, model in models.items()}
            _write_json(self.root / "results.json", _results(self.root, questions, replies))

        self.timed("judge", work)


def _answers(model: Model, tok: Tokenizer, questions: list[dict[str, Any]]) -> list[str]:
    prompts = [question["messages"] for question in questions]
    return generate(model.cfg, model.params, tok, prompts, max_new_tokens=48)


def _results(root: Path, questions: list[dict], replies: dict[str, list[str]]) -> dict[str, Any]:
    kinds = sorted({question["kind"] for question in questions})
    rows = [
        question | {name: texts[i] for name, texts in replies.items()}
        for i, question in enumerate(questions)
    ]

    def rate(name: str, kind: str | None = None) -> float:
        chosen = [row for row in rows if kind in (None, row["kind"])]
        return sum(row[name].strip() in row["answers"] for row in chosen) / len(chosen)

    evals = [row for row in read_metrics(root / "dpo" / "metrics.jsonl") if row["split"] == "eval"]
    first, last = evals[0], evals[-1]
    return {
        "exact": {name: rate(name) for name in replies},
        "exact_by_kind": {kind: {name: rate(name, kind) for name in replies} for kind in kinds},
        "preference_accuracy": {
            "sft_log_likelihood": first["eval_logps/accuracies"],
            "dpo_implicit_reward": last["eval_rewards/accuracies"],
        },
        "questions": rows,
    }


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    os.replace(temporary, path)


def _summary(results: dict[str, Any], page: Path) -> str:
    exact, accuracy = results["exact"], results["preference_accuracy"]
    lines = [
        "",
        "Everything here is synthetic: a little world that the package makes up.",
        "exact answers to held-out questions: "
        + ", ".join(f"{name} {100 * value:.0f}%" for name, value in exact.items()),
        "held-out preferences: log-likelihood of the SFT model "
        f"{100 * accuracy['sft_log_likelihood']:.0f}%, implicit reward after DPO "
        f"{100 * accuracy['dpo_implicit_reward']:.0f}%",
        "",
    ]
    shown, kinds = [], set()
    for row in results["questions"]:
        if row["kind"] not in kinds:
            kinds.add(row["kind"])
            shown.append(row)
    for row in shown[:3]:
        lines += [f"you:   {message['content']}" for message in row["messages"][-1:]]
        lines += [f"base:  {row['base']!r}", f"model: {row['dpo']}", ""]
    return "\n".join([*lines, f"report: {page}", ""])
