"""`report.html` of a demo: the report of its two runs, and their answers to held-out questions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from etils import epath

from zephyr_jax.reports.html import Page, duration, percent
from zephyr_jax.reports.run import (
    Run,
    add_configuration,
    add_data,
    add_heldout,
    add_learning,
    read_json,
    read_run,
)
from zephyr_jax.reports.samples import add_replies

_MODELS = {"base": "base", "sft": "SFT", "dpo": "DPO"}
_SHOWN_PER_KIND, _SHOWN_WRONG = 2, 20
_KINDS = {
    "fact": "one fact of the world",
    "sum": "add two numbers",
    "reverse": "say words backwards",
    "copy": "repeat words",
    "first": "name the first word",
    "last": "name the last word",
    "join": "join two words",
    "attribute": "follow-up: another property",
    "entity": "follow-up: another creature",
}
_LEAD = """One run of the zephyr_jax demo: raw records are cleaned and packed, a Mistral-shaped \
model with random weights (“base”) learns dialogues (SFT) and then which of two answers is better \
(DPO). All of it is synthetic: the package makes up a little world and every question, answer and \
rating in it, so the numbers show that the pipeline works, not what a language model knows."""
_SHORT = """This was a short run: a few steps a stage, enough to show the pipeline but not to \
learn. The numbers below say nothing about what the full demo reaches."""
_NEXT = """# Chat with the model that this run exported:
python scripts/generate.py --model={model} --chat --temperature=0

# The real recipe, on Mistral 7B and on accelerators (on a laptop: configs/real_small_sft.py and
# configs/real_small_dpo.py in the same way). FOLDER: the jsonl files
# of UltraChat 200k and of UltraFeedback binarized
python scripts/prepare_data.py ultrachat --source=FOLDER --data_dir=data --config_name=200k
python scripts/prepare_data.py ultrafeedback --source=FOLDER --data_dir=data --config_name=binarized
python scripts/train.py --config=configs/zephyr_7b_sft.py --workdir=runs/zephyr_7b_sft
python scripts/train.py --config=configs/zephyr_7b_dpo.py --workdir=runs/zephyr_7b_dpo
python scripts/port_weights.py export runs/zephyr_7b_dpo zephyr-7b --format=hf"""


def write_demo_report(root: Path) -> Path:
    """Writes `root/report.html` from a finished demo; returns its path.

    Raises:
        FileNotFoundError: if `root` holds no demo, or one of its runs is missing.
    """
    folder = epath.Path(root)
    runs = [read_run(folder / stage) for stage in ("sft", "dpo")]
    results, seconds = (read_json(folder / name) for name in ("results.json", "timing.json"))
    page = Page("A small model, from random weights to aligned")
    page.text(_LEAD)
    if read_json(folder / "demo.json").get("short"):
        page.text(_SHORT, "warning")
    _add_headline(page, results, runs[1], sum(seconds.values()))
    page.heading("Answers to questions that the corpus never asks")
    _add_answers(page, results)
    for run in runs:
        page.heading(run.kind)
        page.text(run.progress, "soft")
        add_learning(page, run)
        add_heldout(page, run)
        add_configuration(page, run)
    page.heading("Data")
    for run in runs:
        add_data(page, run)
    page.heading("Time")
    total = sum(seconds.values())
    rows = [[stage, duration(x), percent(x / total)] for stage, x in seconds.items()]
    page.table(["stage", "time", "share"], [*rows, ["all", duration(total), ""]], 1, total=True)
    page.heading("Next steps")
    page.code(_NEXT.format(model=shlex.quote(str(root / "hf"))))
    page.write(folder / "report.html")
    return root / "report.html"


def _add_headline(page: Page, results: dict[str, Any], dpo: Run, seconds: float) -> None:
    exact, accuracy = results["exact"], results["preference_accuracy"]
    title = "Preference accuracy"
    if dpo.pairs:
        title += f", {len(dpo.pairs.ids)} held-out pairs"
    page.tiles(
        {
            f"Exact answers to {len(results['questions'])} held-out questions": [
                (_MODELS[name], percent(rate)) for name, rate in exact.items()
            ],
            title: [
                ("SFT, log-likelihood", percent(accuracy["sft_log_likelihood"])),
                ("after DPO, implicit reward", percent(accuracy["dpo_implicit_reward"])),
            ],
            "Total time": [("all stages", duration(seconds))],
        }
    )


def _add_answers(page: Page, results: dict[str, Any]) -> None:
    questions, exact = results["questions"], results["exact"]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for question in questions:
        by_kind.setdefault(question["kind"], []).append(question)
    rows = [
        [_KINDS[kind], str(len(own)), *map(percent, results["exact_by_kind"][kind].values())]
        for kind, own in by_kind.items()
    ]
    rows.append(["all", str(len(questions)), *map(percent, exact.values())])
    page.text("Replies are greedy; a right one is exactly one of the answers the world allows.")
    caption = "Exact answers, by kind of question (n of each)"
    page.table(["kind", "n", *(_MODELS[name] for name in exact)], rows, 1, caption, total=True)
    page.text(f"Below: the first {_SHOWN_PER_KIND} questions of each kind, not picked.", "soft")
    for kind, own in by_kind.items():
        page.heading(_KINDS[kind].capitalize(), 3)
        for question in own[:_SHOWN_PER_KIND]:
            _add_question(page, question)
    wrong = [question for question in questions if not _is_exact(question, "dpo")]
    if wrong:
        first = wrong[:_SHOWN_WRONG]
        details = page.details(f"What DPO still gets wrong ({len(wrong)}; {len(first)} shown)")
        for question in first:
            _add_question(details, question)


def _is_exact(question: dict[str, Any], name: str) -> bool:
    return question[name].strip() in question["answers"]


def _add_question(page: Page, question: dict[str, Any]) -> None:
    replies = []
    for name, words in _MODELS.items():
        if _is_exact(question, name):
            replies.append((f"{words}  ✓ right", question[name], "right"))
        else:
            replies.append((f"{words}  ✗ wrong", question[name], "wrong"))
    add_replies(page, question["messages"], replies)
