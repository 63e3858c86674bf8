"""`report.html` of a training run: what was learned from what, how fast, in one offline file.

A run that is still under way gives a page too; what is missing is named there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from zephyr_jax._version import __version__
from zephyr_jax.evaluation.summary import shown
from zephyr_jax.reports.curves import dpo_plots, sft_plots, speed_plots, step_plots
from zephyr_jax.reports.data import packed_set, prepared_account, prepared_set
from zephyr_jax.reports.html import (
    duration,
    escape,
    lines_block,
    missing,
    percent,
    table,
    tile,
    write_page,
)
from zephyr_jax.reports.pair_plots import reward_plots
from zephyr_jax.reports.plots import Histogram, Plot, figures
from zephyr_jax.reports.run_folder import (
    Run,
    differences,
    packed_manifest,
    prepared_reports,
    read_json,
    read_run,
    recipe_of,
)
from zephyr_jax.reports.samples import FILE
from zephyr_jax.training.workdir import flat

_COLUMNS = 6  # evaluations in the table
_OF_SOURCES = ("pairs", "loss", "rewards/accuracies", "rewards/margins")


def write_run_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Writes `workdir/report.html` from what the run has left there so far; returns its path.

    Raises:
        FileNotFoundError: if no run was begun in `workdir`.
    """
    run = read_run(workdir)
    sections = (_headline, _learning, _heldout, _samples, _speed, _data, _config, _lineage)
    body = "\n".join(section(run) for section in sections)
    page = run.root / "report.html"
    write_page(page, f"{run.name}: run report", body)
    return page


def _headline(run: Run) -> str:
    kind = "Preference optimization" if run.preferences else "Supervised fine-tuning (SFT)"
    if run.preferences and run.config["dpo"].get("loss", "sigmoid") == "sigmoid":
        kind = "Direct preference optimization (DPO)"
    data = run.config["data"]
    said = f"{kind} on {data['dataset']}, {data['train_split']}. {_progress(run)}"
    first, last = (run.evals[0], run.evals[-1]) if run.evals else ({}, {})
    tiles = tile("Held-out loss", _ends("eval_loss", first, last))
    if run.preferences:
        accuracy = [
            (f"{words}, step {row['step']}", percent(row[name]))
            for words, name, row in (
                ("log-likelihood", "eval_logps/accuracies", first),
                ("implicit reward", "eval_rewards/accuracies", last),
            )
            if name in row
        ]
        tiles += tile("Chosen answer wins, held-out", accuracy, wide=True)
    rates = {"target tokens/s": "target_tokens_per_s", "pairs/s": "pairs_per_s"}
    found = [(label, run.typical(name)) for label, name in rates.items()]
    tiles += tile("Speed", [(label, _rate(rate)) for label, rate in found if rate is not None])
    wall, goodput = run.seconds()
    spent = [("wall", duration(wall))] if wall else []
    spent += [("goodput", percent(goodput))] if goodput is not None else []
    mfu = run.typical("mfu")
    spent += [("MFU", percent(mfu))] if mfu is not None else []
    tiles += tile("Time", spent)
    return f'<h1>{escape(run.name)}</h1><p>{escape(said)}</p><div class="tiles">{tiles}</div>'


def _progress(run: Run) -> str:
    step, total = run.step, run.total_steps
    if not step:
        return "No step is logged yet."
    of = f"{step:,} of {total:,} steps" if total else f"{step:,} steps"
    ends = "done" if step == total else "so far; the page shows an unfinished run"
    at = ", ".join(f"{start:,}" for start in run.starts)
    return f"{of} {ends}." + (f" Stopped and continued after step {at}." if at else "")


def _ends(name: str, first: dict[str, Any], last: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [first] if first is last else [first, last]
    return [(f"step {row['step']:,}", shown(row[name])) for row in rows if name in row]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _learning(run: Run) -> str:
    if not run.rows:
        return "<h2>Learning</h2>" + missing("no metrics yet")
    sigmoid = run.preferences and run.config["dpo"].get("loss", "sigmoid") == "sigmoid"
    plots = dpo_plots(run.rows, sigmoid) if run.preferences else sft_plots(run.rows)
    plots = [plot for plot in plots if not plot.name.endswith("-rate")]  # speed has its own place
    plots += step_plots(run.rows, run.config["optim"]["max_grad_norm"])
    return f"<h2>Learning</h2>{_drawn(plots)}"


def _drawn(plots: Iterable[Plot | Histogram]) -> str:
    return figures([plot for plot in plots if isinstance(plot, Histogram) or plot.series])


def _heldout(run: Run) -> str:
    title = "<h2>Held-out figures</h2>"
    if not run.evals:
        return title + missing("not evaluated yet")
    rows = _spaced(run.evals, _COLUMNS)
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval_"))
    plain = [name for name in names if not name.startswith("eval_source/")]
    cells = [
        [
            escape(name.removeprefix("eval_")),
            *(shown(row[name]) if name in row else "" for row in rows),
        ]
        for name in plain
    ]
    head = ["", *(f"step {row['step']:,}" for row in rows)]
    said = f"{len(rows)} of {len(run.evals)} evaluations" if len(rows) < len(run.evals) else ""
    parts = [title, table(head, cells, 1, said), _sources(rows[-1])]
    pairs = run.pairs()
    if pairs is not None and (pairs.logps != pairs.ref_logps).any():
        plots = reward_plots(pairs, run.config["dpo"]["beta"])
        ended = f"{len(pairs.ids):,} held-out pairs, last evaluation"
        plots = [
            dataclasses.replace(plot, caption=f"{plot.caption} {ended.capitalize()}.")
            for plot in plots
        ]
        parts.append(f"<h3>How the rewards of the held-out set lie</h3>{_drawn(plots)}")
    return "".join(parts)


def _spaced(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` rows, evenly over all, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _sources(row: dict[str, Any]) -> str:
    """The last evaluation by source."""
    by_name: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        for figure in _OF_SOURCES:
            if name.startswith("eval_source/") and name.endswith(f"/{figure}"):
                source = name.removeprefix("eval_source/").removesuffix(f"/{figure}")
                by_name.setdefault(source, {})[figure] = value
    if not by_name:
        return ""
    rows = [
        [escape(source), f"{own.get('pairs', 0):,.0f}"]
        + [shown(own[figure]) if figure in own else "" for figure in _OF_SOURCES[1:]]
        for source, own in by_name.items()
    ]
    head = ["source", *_OF_SOURCES]
    return table(head, rows, 1, f"By source, at step {row['step']:,}")


def _samples(run: Run) -> str:
    title = "<h2>Sample replies</h2>"
    made = read_json(run.root / FILE)
    if "replies" not in made:
        again = f"Make some: python -m zephyr_jax report {run.root} --samples=3"
        return title + missing(made.get("reason", again))
    shown_ = []
    for at, prompt in enumerate(made["prompts"]):
        turns = "".join(
            f'<p class="turn"><b>{escape(turn["role"])}</b> '
            f'<span class="said">{escape(turn["content"])}</span></p>'
            for turn in prompt["messages"]
        )
        columns = [(f"step {int(step):,}", texts[at]) for step, texts in made["replies"].items()]
        columns.append(("the record's own answer", prompt["answer"]))
        replies = "".join(
            f'<div class="reply"><header><span>{escape(who)}</span></header>'
            f'<div class="said">{escape(text.strip()) or "(nothing)"}</div></div>'
            for who, text in columns
        )
        shown_.append(
            f'<div class="asked"><p class="soft">{escape(prompt["place"])}</p>{turns}'
            f'<div class="replies fit">{replies}</div></div>'
        )
    return (
        f"{title}<p>Greedy, at most {made['tokens']} tokens, of each checkpoint that is kept. "
        f"The first prompts of the held-out split that leave room, not picked.</p>{''.join(shown_)}"
    )


def _speed(run: Run) -> str:
    plots = [plot for plot in speed_plots(run.rows) if plot.series]
    if not plots:
        return "<h2>Throughput</h2>" + missing("no step is logged yet")
    names = {
        "tokens with loss per second": "target_tokens_per_s",
        "tokens per second, padding left out": "tokens_per_s",
        "pairs per second": "pairs_per_s",
        "MFU": "mfu",
    }
    rows = [[label, _rate(rate)] for label, name in names.items() if (rate := run.typical(name))]
    tokens = sum(row.get("target_tokens", 0) for row in run.train)
    rows += [["tokens with loss, all steps", f"{tokens:,.0f}"]] if tokens else []
    wall, goodput = run.seconds()
    rows += [["wall time, all starts", duration(wall)]]
    rows += [["goodput: share of it inside steps", percent(goodput)]] if goodput is not None else []
    said = "Rates: the median of the logged lines but the first, which compiles"
    return f"<h2>Throughput</h2>{table(['', ''], rows, 1, said)}{_drawn(plots)}"


def _data(run: Run) -> str:
    data, parts = run.config["data"], ["<h2>Data</h2>"]
    for name, report in prepared_reports(run).items():
        parts.append(f"<h3>{escape(name)}</h3>")
        if not report:
            parts.append(missing(f"the prepared set is not in {data['data_dir']} any more"))
            continue
        parts.append(
            f"{prepared_account(report)}<details><summary>What each rule did, with examples"
            f"</summary>{prepared_set(report, 'rule')}</details>"
        )
    manifest = packed_manifest(run)
    gone = f"the packed set is not in {data['data_dir']} any more" if run.meta else "no checkpoint"
    parts.append(f"<h3>Packed rows</h3>{packed_set(manifest) if manifest else missing(gone)}")
    return "".join(parts)


def _config(run: Run) -> str:
    title, own, recipe = "<h2>Configuration</h2>", flat(run.config), recipe_of(run)
    if recipe is None:
        said = missing(f"No recipe named {run.name} ships with zephyr_jax {__version__}.")
    else:
        found = differences([recipe, own])
        rows = [[escape(name), *map(escape, values)] for name, values in found.items()]
        of = f"the recipe {run.name} of zephyr_jax {__version__}"
        said = f"<p>No field differs from {escape(of)}.</p>"
        if rows:
            caption = f"{len(rows)} of {len(own)} fields differ from {of}"
            said = table(["field", "recipe", "this run"], rows, 3, caption, wraps=True)
    block = lines_block(f"{name} = {value!r}" for name, value in own.items())
    return f"{title}{said}<details><summary>All {len(own)} fields</summary>{block}</details>"


def _lineage(run: Run) -> str:
    title = "<h2>Lineage</h2>"
    if not run.meta:
        return title + missing("no checkpoint yet, so nothing is stored of where the model is from")
    lines = "".join(f"<li>{escape(line)}</li>" for line in run.meta.get("lineage", []))
    names = {
        "begun_with": "parameters it began with, digest",
        "dataset_digest": "records, digest",
        "packed": "packed set",
        "reference_digest": "reference log-probs, digest",
    }
    rows = [[words, escape(run.meta[key])] for key, words in names.items() if key in run.meta]
    rows.append(["folder", escape(run.root)])
    rows.append(["checkpoints kept", escape(", ".join(f"{step:,}" for step in run.kept))])
    return f"{title}<ol>{lines}</ol>{table(['', ''], rows, 2, wraps=True)}"
