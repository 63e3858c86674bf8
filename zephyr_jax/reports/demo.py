"""`report.html` of a demo: what was learned, from what, how fast, in one offline file.

A demo that is still under way gives a page too; what is missing is named there.
"""

from __future__ import annotations

import dataclasses
import html
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from zephyr_jax.evaluation.pairs import load_table
from zephyr_jax.reports import plots as report_plots
from zephyr_jax.reports.curves import dpo_plots, sft_plots
from zephyr_jax.reports.data import packed_set, prepared_set, stage_of
from zephyr_jax.reports.html import MISSING, duration, escape, percent, table, tile, write_page
from zephyr_jax.reports.pair_plots import reward_plots
from zephyr_jax.training.metrics import read_metrics

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
_STAGES = {
    "corpus": "write the raw records, train the tokenizer",
    "prepare": "clean, binarize, write the TFDS sets",
    "sft": "supervised fine-tuning, packing and evaluation included",
    "dpo": "preference optimization, packing, reference log-probs and evaluation included",
    "export": "Hugging Face folder, read back and compared",
    "judge": "answer the held-out questions with all three models",
}
_SETS = {
    "ultrachat": ("Dialogues (UltraChat's raw schema)", "cleaning rule"),
    "ultrafeedback": ("Preferences (UltraFeedback's raw schema)", "binarization rule"),
}


@dataclasses.dataclass(frozen=True)
class _Demo:
    """What a demo's folder holds so far; empty where a stage has not run."""

    root: Path
    settings: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    results: dict[str, Any]
    seconds: dict[str, float]
    prepared: dict[str, dict[str, Any]]
    packed: list[dict[str, Any]]


def write_report(root: Path) -> Path:
    """Writes `root/report.html` from what the demo in `root` has left so far; returns its path.

    Raises:
        FileNotFoundError: if `root` is not the folder of a demo.
    """
    root = Path(root)
    if not (root / "demo.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no demo (no demo.json there); "
            f"make one with: python -m zephyr_jax demo --workdir={shlex.quote(str(root))}"
        )
    demo = _load(root)
    sections = (_headline, _curves, _replies, _data, _time, _go_on)
    body = "\n".join(section(demo) for section in sections)
    page = root / "report.html"
    write_page(epath.Path(page), "zephyr_jax: demo report", body)
    return page


def _load(root: Path) -> _Demo:
    reports = sorted(root.glob("data/[!.]*/*/*/report.json"))
    manifests = sorted(root.glob("data/packed/*/manifest.json"), reverse=True)  # SFT first
    return _Demo(
        root,
        _json(root / "demo.json"),
        {stage: _json(root / stage / "run_config.json") for stage in ("sft", "dpo")},
        {stage: read_metrics(root / stage / "metrics.jsonl") for stage in ("sft", "dpo")},
        _json(root / "results.json"),
        _json(root / "timing.json"),
        {path.parents[2].name: _json(path) for path in reports},
        [_json(path) for path in manifests if path.parent.suffix != ".tmp"],
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _headline(demo: _Demo) -> str:
    short = ""
    if demo.settings.get("short"):
        short = (
            '<p class="warn">This was a short run: a few steps a stage, enough to show the road '
            "but not to learn. The numbers below say nothing about what the full demo reaches.</p>"
        )
    questions = demo.results.get("questions", [])
    exact: dict[str, float] = demo.results.get("exact", {})
    tiles = tile(
        f"Exact answers to {len(questions)} held-out questions" if exact else "Exact answers",
        [(_MODELS.get(name, name), percent(rate)) for name, rate in exact.items()],
        wide=True,
    )
    accuracy, pairs = demo.results.get("preference_accuracy", {}), _heldout_pairs(demo)
    numbers = []
    if accuracy:
        numbers = [
            ("SFT, log-likelihood", percent(accuracy["sft_log_likelihood"])),
            ("after DPO, implicit reward", percent(accuracy["dpo_implicit_reward"])),
        ]
    title = f"Preference accuracy, {pairs} held-out pairs" if pairs else "Preference accuracy"
    tiles += tile(title, numbers, wide=True)
    total = [("all stages", duration(sum(demo.seconds.values())))] if demo.seconds else []
    tiles += tile("Total time", total)
    return f"""<h1>A small model, from random weights to aligned</h1>
<p>One run of the zephyr_jax demo: raw records are cleaned and packed, a Mistral-shaped model with
random weights (“base”) learns dialogues (SFT) and then which of two answers is better (DPO).
<strong>All of it is synthetic</strong>: the package makes up a little world and every question,
answer and rating in it, so the numbers show that the road works, not what a language model
knows.</p>
{short}<div class="tiles">{tiles}</div>"""


def _heldout_pairs(demo: _Demo) -> int:
    counts = [m["splits"]["eval"]["documents"] for m in demo.packed if stage_of(m) == "dpo"]
    return counts[0] if len(counts) == 1 else 0


def _curves(demo: _Demo) -> str:
    parts = ["<h2>Training</h2>"]
    for stage, title, plots in (
        ("sft", "Supervised fine-tuning (SFT)", sft_plots),
        ("dpo", "Direct preference optimization (DPO)", dpo_plots),
    ):
        rows = demo.metrics[stage]
        parts.append(f"<h3>{title}</h3>")
        if not rows:
            parts.append(MISSING)
            continue
        parts.append(f'<p class="soft">{escape(_recipe(demo.configs[stage], rows))}</p>')
        drawn = [plot for plot in plots(rows) if plot.series]
        parts.append(report_plots.figures([*drawn, *_rewards(demo, stage)]))
    return "\n".join(parts)


def _rewards(demo: _Demo, stage: str) -> list[report_plots.Histogram]:
    """Of the held-out pairs at the last evaluation."""
    tables = sorted((demo.root / stage / "evaluations").glob("*.npz"))
    if not tables:
        return []
    plots = reward_plots(load_table(tables[-1]), demo.configs[stage]["dpo"]["beta"])
    title = "{}, held-out, at the end"
    return [dataclasses.replace(plot, title=title.format(plot.title)) for plot in plots]


def _recipe(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    said = f"{rows[-1]['step']} steps"
    if not config:
        return said + "."
    model, train, optim = config["model"], config["train"], config["optim"]
    if config.get("dpo"):
        batch = f"{train['batch_size']} pairs a batch, β {config['dpo']['beta']:g}"
    else:
        batch = f"{train['batch_size']} rows of {config['data']['seq_len']} tokens a batch"
    return (
        f"{said}; {batch}; peak learning rate {optim['peak_lr']:g}, {optim['schedule']} decay. "
        f"Model: {model['num_hidden_layers']} layers, width {model['hidden_size']}, "
        f"{model['vocab_size']} pieces, {model['dtype']}."
    )


def _replies(demo: _Demo) -> str:
    title = "<h2>Replies to questions that the corpus never asks</h2>"
    results = demo.results
    if not results:
        return title + MISSING
    names = list(results["exact"])
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in results["questions"]:
        by_kind.setdefault(row["kind"], []).append(row)
    rows = [
        [escape(_KINDS.get(kind, kind)), str(len(asked))]
        + [percent(results["exact_by_kind"][kind][name]) for name in names]
        for kind, asked in by_kind.items()
    ]
    rows.append(["all", str(len(results["questions"]))])
    rows[-1] += [percent(results["exact"][name]) for name in names]
    head = ["kind", "n", *(escape(_MODELS.get(name, name)) for name in names)]
    rates = table(
        head, rows, numeric=1, total=True, caption="Exact answers, by kind of question (n of each)"
    )
    shown = [
        f"<h3>{escape(_KINDS.get(kind, kind).capitalize())}</h3>"
        + "".join(_asked(row, names) for row in asked[:_SHOWN_PER_KIND])
        for kind, asked in by_kind.items()
    ]
    wrong = [row for row in results["questions"] if not _is_exact(row, names[-1])]
    missed = "".join(_asked(row, names) for row in wrong[:_SHOWN_WRONG])
    more = f"first {_SHOWN_WRONG} of {len(wrong)}" if len(wrong) > _SHOWN_WRONG else len(wrong)
    details = (
        f"<details><summary>What {escape(_MODELS.get(names[-1], names[-1]))} still gets wrong "
        f"({more})</summary>{missed}</details>"
    )
    return f"""{title}
<p>Replies are greedy; one is right when it is, to the letter, one of the answers that the world
allows.</p>
{rates}
<p class="soft">Below: the first {_SHOWN_PER_KIND} questions of each kind, not picked.</p>
{"".join(shown)}
{details if wrong else ""}"""


def _is_exact(row: dict[str, Any], name: str) -> bool:
    return row[name].strip() in row["answers"]


def _asked(row: dict[str, Any], names: Iterable[str]) -> str:
    turns = "".join(
        f'<p class="turn"><b>{escape(turn["role"])}</b> <span class="said">'
        f"{escape(turn['content'])}</span></p>"
        for turn in row["messages"]
    )
    replies = ""
    for name in names:
        right = _is_exact(row, name)
        replies += (
            f'<div class="reply {"right" if right else "wrong"}">'
            f"<header><span>{escape(_MODELS.get(name, name))}</span>"
            f'<span class="verdict">{"✓ right" if right else "✗ wrong"}</span></header>'
            f'<div class="said">{escape(row[name]) or "(nothing)"}</div></div>'
        )
    return f'<div class="asked">{turns}<div class="replies">{replies}</div></div>'


def _data(demo: _Demo) -> str:
    parts = ["<h2>Data</h2>"]
    for name, (title, rule) in _SETS.items():
        parts.append(f"<h3>{title}</h3>")
        report = demo.prepared.get(name)
        parts.append(prepared_set(report, rule) if report else MISSING)
    parts.append("<h3>Packing</h3>")
    parts += [packed_set(manifest) for manifest in demo.packed] or [MISSING]
    return "\n".join(parts)


def _time(demo: _Demo) -> str:
    seconds = demo.seconds
    total = sum(seconds.values()) or 1.0
    rows = [
        [
            escape(stage),
            escape(_STAGES.get(stage, "")),
            duration(seconds[stage]) if stage in seconds else MISSING,
            f'<div class="bar" style="width:{100 * seconds.get(stage, 0) / total:.1f}%"></div>',
        ]
        for stage in _STAGES | seconds
    ]
    rows.append(["all", "", duration(sum(seconds.values())), ""])
    head = ["stage", "", "time", ""]
    return "<h2>Time</h2>" + table(head, rows, numeric=2, total=True)


def _go_on(demo: _Demo) -> str:
    model = shlex.quote(str(demo.root / "hf"))
    note = "" if (demo.root / "hf").is_dir() else '<p class="missing">The export: not run yet</p>'
    chat = f"python scripts/generate.py --model={model} --chat --temperature=0"
    real = """# FOLDER: jsonl files of UltraChat 200k and of UltraFeedback binarized
python scripts/prepare_data.py ultrachat --source=FOLDER --data_dir=data --config_name=200k
python scripts/prepare_data.py ultrafeedback --source=FOLDER --data_dir=data --config_name=binarized
python scripts/train.py --config=configs/zephyr_7b_sft.py --workdir=runs/zephyr_7b_sft
python scripts/train.py --config=configs/zephyr_7b_dpo.py --workdir=runs/zephyr_7b_dpo
python scripts/port_weights.py export runs/zephyr_7b_dpo zephyr-7b --format=hf"""
    return f"""<h2>How to go on</h2>
<p>Talk to the model that this run exported:</p>
{note}<pre>{html.escape(chat)}</pre>
<p>The real recipe, on Mistral 7B and on accelerators:</p>
<pre>{html.escape(real)}</pre>
<p>To try real text on a laptop, take <code>configs/real_small_sft.py</code> and
<code>configs/real_small_dpo.py</code> in the same way.</p>"""
