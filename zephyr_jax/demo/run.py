"""The whole pipeline on an embedded world: raw records, TFDS, SFT, feedback, DPO, HF folder, chat.

A stage whose result exists under --workdir is skipped: started again, a demo goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.chips import keep_freed_memory
from zephyr_jax.cli import flags
from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.prepare.prepare import VERSION, prepare
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.demo import corpus
from zephyr_jax.evaluation.answers import write_rows
from zephyr_jax.evaluation.endpoints import Spending
from zephyr_jax.feedback import config as feedback
from zephyr_jax.feedback.collect import collect
from zephyr_jax.inference.generate import generate
from zephyr_jax.models.mistral import init_params
from zephyr_jax.reports.fit import fit
from zephyr_jax.reports.page import Page, duration, percent
from zephyr_jax.reports.plots import learning_plots
from zephyr_jax.reports.run import Run, add_heldout, model_card_fields, read_json
from zephyr_jax.reports.samples import add_replies
from zephyr_jax.storage import atomic_path, write_checked
from zephyr_jax.weights.checkpoint import Model
from zephyr_jax.weights.huggingface import export_hf
from zephyr_jax.weights.sources import load_model

DIALOGUES, PROMPTS, SHORT_STEPS = 5000, 1500, 20
FEEDBACK_PROMPTS = 256
SETS = ("ultrachat", "ultrafeedback")
PAIRS = ("ultrafeedback/raw", "feedback/ultrafeedback/raw")
_MODELS = {"base": "base", "sft": "SFT", "dpo": "DPO"}
_LEAD = """One run of the zephyr_jax demo: raw records are cleaned and packed, a Mistral-shaped \
model with random weights (“base”) learns dialogues (SFT), samples of it are rated, and it learns \
which of two answers is better (DPO). All of it is synthetic: the package makes up a little world \
and every question, answer and rating in it, so the numbers show that the pipeline works, not what \
a language model knows."""
_BETTER = """A better answer is led up to: the chosen reply ends with it, the rejected one blurts \
it out first, or is wrong."""
_FORMS = {
    "chosen": "right, ends with the answer (chosen form)",
    "rejected": "right, blurts it out (rejected form)",
    "wrong": "wrong",
}
_SHORT = """This was a short run: a few steps a stage, enough to show the pipeline but not to \
learn. The numbers below say nothing about what the full demo reaches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    flags.add_workdir(parser, "folder for everything (demo_run)", default="demo_run")
    short = f"only {SHORT_STEPS} steps a stage: shows the pipeline, not what the model can learn"
    parser.add_argument("--short", action="store_true", help=short)
    flags.add_seed(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the stages in order; a ValueError if the folder holds a demo with other settings."""
    root, settings = Path(args.workdir), {"short": args.short, "seed": args.seed}
    found = read_json(root / "demo.json") or settings
    if found != settings:
        raise ValueError(f"{root} holds a demo with {found}, not {settings}; take another folder")
    keep_freed_memory()
    for unfinished in list(root.rglob(".*.tmp")):  # of a demo that was killed
        unfinished.unlink(missing_ok=True)
    write_checked(root / "demo.json", settings)
    sft, dpo = (_config(stage, root, **settings) for stage in ("sft", "dpo"))
    rated = f"data/feedback/ultrafeedback/raw/{VERSION}"
    stages = (  # each with the last file or folder that it leaves
        ("corpus", "raw", lambda: _write_corpus(root, sft)),
        ("prepare", "", lambda: [prepare(x, root / "raw" / x, root / "data", "raw") for x in SETS]),
        ("sft", "sft/report.html", lambda: fit(sft, root / "sft")),
        ("feedback", rated, lambda: _collect_feedback(root, **settings)),
        ("dpo", "dpo/report.html", lambda: fit(dpo, root / "dpo")),
        ("export", "hf", lambda: _export(root)),
        ("judge", "results.json", lambda: write_checked(root / "results.json", _judge(root, sft))),
    )
    for name, result, compute in stages:
        if result and (root / result).exists():
            continue
        logging.info("stage %s", name)
        start, seconds = time.monotonic(), read_json(root / "timing.json")
        try:
            compute()
        finally:
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - start, 2)
            write_checked(root / "timing.json", seconds)
    sys.stdout.write(_summary(read_json(root / "results.json"), write_demo_report(root)))


def _config(stage: str, root: Path, short: bool, seed: int) -> RunConfig:
    inputs = {"sft": [f"data.tokenizer={root / 'raw' / 'tokenizer'}"]}
    inputs["dpo"] = [f"init={root / 'sft'}", f"data.dataset={dict.fromkeys(PAIRS, 1.0)}"]
    overrides = [f"data.data_dir={root / 'data'}", *inputs[stage], f"seed={seed}"]
    if short:
        overrides.append(f"train.max_steps={SHORT_STEPS}")
    return load_config(f"demo_{stage}", [f"--config.{override}" for override in overrides])


def _write_corpus(root: Path, config: RunConfig) -> None:
    with atomic_path(root / "raw") as raw:
        corpus.write_ultrachat(raw / "ultrachat", DIALOGUES, config.seed)
        corpus.write_ultrafeedback(raw / "ultrafeedback", PROMPTS, config.seed)
        lines = corpus.tokenizer_lines(*(raw / name for name in SETS))
        path = raw / "tokenizer" / "tokenizer.model"
        corpus.train_tokenizer(lines, path, config.model.vocab_size)


def _collect_feedback(root: Path, short: bool, seed: int) -> None:
    """Four samples of the SFT model for each of some new prompts, rated by the world's oracle."""
    folder = root / "feedback"
    known = {row["instruction"] for row in _rows(root / "raw" / "ultrafeedback")}
    tasks = corpus.feedback_tasks(SHORT_STEPS if short else FEEDBACK_PROMPTS, seed, known)
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in tasks])
    model = {"model": str(root / "sft"), "temperature": 1.0, "top_p": 1.0, "max_tokens": 48}
    samples = {f"sample {i}": feedback.ContestantConfig(**model, seed=i) for i in range(1, 5)}
    prompts = feedback.PromptsConfig(str(folder / "prompts.jsonl"))
    judge = feedback.JudgeConfig(kind="function", aspects=())
    config = feedback.FeedbackConfig("demo_feedback", seed, prompts, samples, judge, batch_size=64)

    def rate(prompt: str, reply: str) -> dict[str, Any]:
        return corpus.rate(tasks[prompt], reply.strip())

    rows = collect(config, folder, Spending(), rate)
    rules = BinarizationRules(pairing="best_vs_worst", ties="keep" if short else "drop")
    prepare("ultrafeedback", rows, root / "data" / "feedback", "raw", rules=rules)


def _rows(folder: Path, pattern: str = "*.jsonl") -> list[Any]:
    return [row for path in sorted(folder.glob(pattern)) for _, row in numbered_rows(path)]


def _export(root: Path) -> None:
    model = load_model(root / "dpo")
    card = model_card_fields(root / "dpo", model.lineage)
    export_hf(*model[:3], root / "hf", dtype="float32", card=card)


def _judge(root: Path, config: RunConfig) -> dict[str, Any]:
    """Replies of the base, SFT and DPO models to held-out questions, and what they are worth."""
    questions = corpus.heldout_questions(config.seed)
    tok = Tokenizer.from_folder(root / "raw" / "tokenizer")
    base = Model(config.model, init_params(config.model, jax.random.key(config.seed)), tok, {})
    # The aligned model is the exported one, which others would load.
    models = {"base": base, "sft": load_model(root / "sft"), "dpo": load_model(root / "hf")}
    prompts = [question["messages"] for question in questions]
    for name, model in models.items():
        replies = generate(*model[:3], prompts, max_new_tokens=48)
        for question, reply in zip(questions, replies, strict=True):
            question[name] = reply
    evals = Run(root / "dpo").evals
    accuracy = {"sft_log_likelihood": evals[0]["eval_logps/accuracies"]}
    accuracy["dpo_implicit_reward"] = evals[-1]["eval_rewards/accuracies"]
    exact = _shares(questions, "chosen", "rejected")
    forms = {form: _shares(questions, form) for form in _FORMS}
    return {"exact": exact, "forms": forms, "preference_accuracy": accuracy, "questions": questions}


def _form(question: Mapping[str, Any], name: str) -> str:
    """Which of `_FORMS` a model's reply has, by the world's own list of right replies."""
    reply = question[name].strip()
    if reply not in question["answers"]:
        return "wrong"
    return "rejected" if reply in question["blurting"] else "chosen"


def _shares(questions: Sequence[Mapping[str, Any]], *forms: str) -> dict[str, float]:
    """How often each model's replies have one of these forms."""
    counts = {name: sum(_form(row, name) in forms for row in questions) for name in _MODELS}
    return {name: count / len(questions) for name, count in counts.items()}


def _summary(results: Mapping[str, Any], page: epath.Path) -> str:
    lines = ["", "Everything here is synthetic: a small world that the package makes up.", _BETTER]
    lines += ["", f"{'replies to held-out questions':<44}{'base':>7}{'SFT':>7}{'DPO':>7}"]
    for form, rates in results["forms"].items():
        numbers = "".join(f"{percent(rate):>7}" for rate in rates.values())
        lines.append(f"{_FORMS[form]:<44}{numbers}")
    for row in results["questions"][:60:20]:  # the first of each of three kinds
        lines += ["", f"you:   {row['messages'][-1]['content']}"]
        lines += [f"base:  {row['base']!r}", f"SFT:   {row['sft']}", f"DPO:   {row['dpo']}"]
    return "\n".join([*lines, "", f"report: {page}", ""])


def write_demo_report(root: Path) -> epath.Path:
    """Writes `root/report.html`: both runs of a finished demo, and their answers; its path."""
    folder = epath.Path(root)
    runs = [Run(folder / stage) for stage in ("sft", "dpo")]
    results, seconds = (read_json(folder / name) for name in ("results.json", "timing.json"))
    page, total = Page("A small model, from random weights to aligned"), sum(seconds.values())
    page.text(_LEAD)
    if read_json(folder / "demo.json").get("short"):
        page.text(_SHORT, "warning")
    page.facts({"the SFT run": "sft/report.html", "the DPO run": "dpo/report.html"})
    accuracy, forms, questions = (results[x] for x in ("preference_accuracy", "forms", "questions"))
    page.tiles(
        {
            f"Exact answers to {len(questions)} held-out questions": _percents(results["exact"]),
            "Replies of the rejected form": {
                _MODELS[name]: percent(forms["rejected"][name]) for name in ("sft", "dpo")
            },
            "Preference accuracy, held-out pairs": {
                "SFT, log-likelihood": percent(accuracy["sft_log_likelihood"]),
                "after DPO, implicit reward": percent(accuracy["dpo_implicit_reward"]),
            },
            "Total time": {"all stages": duration(total)},
        }
    )
    page.heading("Feedback on the SFT model's own samples")
    _add_feedback(page, _rows(root / "feedback", "ultrafeedback.jsonl"))
    page.heading("What DPO changed")
    page.text(_BETTER)
    rows = [[_FORMS[form], *_percents(rates).values()] for form, rates in forms.items()]
    counted = f"Greedy replies to the {len(questions)} held-out questions"
    page.table(["", *_MODELS.values()], rows, 1, counted)
    page.heading("Answers to questions that the corpus never asks")
    _add_answers(page, questions)
    for run in runs:
        page.heading(run.kind)
        page.text(run.progress, "soft")
        page.figures(learning_plots(run))
        add_heldout(page, run)
    page.heading("Time")
    rows = [[stage, duration(x), percent(x / total)] for stage, x in seconds.items()]
    page.table(["stage", "time", "share"], [*rows, ["all", duration(total), ""]], 1, total=True)
    page.heading("Chat with the exported model")
    model = shlex.quote(str(root / "hf"))
    page.text(f"python scripts/generate.py --model={model} --chat --temperature=0", "code")
    return page.write(folder / "report.html")


def _percents(rates: Mapping[str, float]) -> dict[str, str]:
    return {_MODELS[name]: percent(rate) for name, rate in rates.items()}


def _add_feedback(page: Page, rows: Sequence[dict[str, Any]]) -> None:
    """Adds what the oracle said of the samples, and the first question on which they differ."""
    scores = [[x["overall_score"] for x in row["completions"]] for row in rows]
    differing = [row for row, own in zip(rows, scores, strict=True) if min(own) < max(own)]
    page.text(
        f"The SFT model answered {len(rows)} further questions four times each, at temperature 1. "
        "The world's own oracle rated the answers: a program that knows every right one, not a "
        f"language model. Of {len(differing)} questions the best and the worst answer are a pair; "
        "one pair in ten is held out, the others trained DPO together with the corpus's own."
    )
    answers = [x for row in rows for x in row["completions"]]
    counts = Counter((x["overall_score"], x["critique"]) for x in answers)
    cells = [
        [critique, f"{score:g}", f"{n:,}", percent(n / len(answers))]
        for (score, critique), n in sorted(counts.items(), reverse=True)
    ]
    page.table(["the oracle's words", "score", "answers", "share"], cells, 1)
    for row in differing[:1]:
        rated = [(f"{x['model']}: {x['overall_score']:g}", x) for x in row["completions"]]
        replies = [(heading, x["response"], "") for heading, x in rated]
        add_replies(page, [{"role": "user", "content": row["instruction"]}], replies)


def _add_answers(page: Page, questions: Sequence[dict[str, Any]]) -> None:
    kinds = {x["kind"]: [y for y in questions if y["kind"] == x["kind"]] for x in questions}
    rows = [
        [kind, str(len(own)), *_percents(_shares(own, "chosen", "rejected")).values()]
        for kind, own in [*kinds.items(), ("all", questions)]
    ]
    page.text("Replies are greedy; a right one is exactly one of the answers the world allows.")
    caption = "Exact answers, by kind of question; attribute and entity are follow-ups"
    page.table(["kind", "n", *_MODELS.values()], rows, 1, caption, total=True)
    page.text("Below: the first two questions of each kind, not picked.", "soft")
    for kind, own in kinds.items():
        page.heading(kind, 3)
        for question in own[:2]:
            replies = []
            for name, words in _MODELS.items():
                form = _form(question, name)
                style = "wrong" if form == "wrong" else "right"
                replies.append((f"{words}: {_FORMS[form]}", question[name], style))
            add_replies(page, question["messages"], replies)
