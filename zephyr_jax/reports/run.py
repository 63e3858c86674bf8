"""A run's folder, and its report: what was learned from what, how fast; finished or not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import Any

import numpy as np
from etils import epath

from zephyr_jax import storage
from zephyr_jax._version import __version__
from zephyr_jax.config import weighted
from zephyr_jax.config.run import load_config
from zephyr_jax.data.prepare.prepare import set_folder
from zephyr_jax.evaluation.evaluate import shown
from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.evaluation.pairs import PairTable, load_table
from zephyr_jax.evaluation.table import read_results, table_rows
from zephyr_jax.reports.data import add_packed_set, add_prepared_set
from zephyr_jax.reports.html import Page, cut, duration, percent
from zephyr_jax.reports.plots import learning_plots, reward_plots, speed_plots
from zephyr_jax.reports.samples import add_samples
from zephyr_jax.training.workdir import flat
from zephyr_jax.weights.checkpoint import FOLDER, saved_steps

_COLUMNS = 6  # evaluations in the table
_START = ("date", "host", "devices", "commit")  # columns, of `chips.environment`
_OF_SOURCES = ("pairs", "loss", "rewards/accuracies", "rewards/margins")
_RATES = {
    "target tokens/s": "target_tokens_per_s",
    "non-padding tokens/s": "tokens_per_s",
    "pairs/s": "pairs_per_s",
}
_LINEAGE = {
    "init_digest": "initial parameters, digest",
    "dataset_digest": "records, digest",
    "packed": "packed set",
    "reference_digest": "reference log-probs, digest",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it stands; what is not written yet, or gone, is empty."""

    root: epath.Path
    config: dict[str, Any]  # as `run_config.json` has it
    rows: list[dict[str, Any]]  # of `metrics.jsonl`
    train: list[dict[str, Any]]  # those of training steps
    evals: list[dict[str, Any]]  # those of evaluations
    kept: list[int]  # steps whose checkpoints are there
    meta: dict[str, Any]  # what the newest of them says of the run
    total_steps: int  # 0 if not written yet
    starts: list[dict[str, Any]]  # `chips.environment` of each start, from `run_info.json`
    best: dict[str, Any]  # `best.json` of a run with `train.keep_best`
    ended: bool  # at its last step, or because evaluations were no better
    pairs: PairTable | None  # the held-out pairs as last evaluated
    prepared: dict[str, dict[str, Any]]  # `report.json` of each prepared set
    packed: dict[str, Any]  # the manifest of the packed set

    @property
    def beta(self) -> float:
        """The scale of the rewards; 0 for a run that learns from dialogues."""
        return self.config["dpo"]["beta"] if self.config.get("dpo") else 0.0

    @property
    def kind(self) -> str:
        """What kind of training it is, in words."""
        if not self.beta:
            return "Supervised fine-tuning (SFT)"
        if self.config["dpo"].get("loss", "sigmoid") == "sigmoid":
            return "Direct preference optimization (DPO)"
        return "Preference optimization"

    @property
    def progress(self) -> str:
        """A sentence on how far the run is, and where it was stopped and resumed."""
        step = max([row["step"] for row in self.rows] + self.kept, default=0)
        if not step:
            return "No step is logged yet."
        of = f"{step:,} of {self.total_steps:,} steps" if self.total_steps else f"{step:,} steps"
        end = "so far; the page shows an unfinished run."
        if self.ended:
            early = "; stopped early, as later evaluations were no better"
            end = f"done{early if step < self.total_steps else ''}."
        both = itertools.pairwise((row["step"], row.get("elapsed_s", 0)) for row in self.train)
        resumed = [f"{before[0]:,}" for before, after in both if after[1] < before[1]]
        if resumed:
            end += f" Stopped and resumed after step {', '.join(resumed)}."
        return f"{of} {end}"

    def best_step(self, metric: str) -> int | None:
        """The best step if this is the metric by which it is: that of `train.keep_best`, or loss.

        None with fewer than two evaluations, too.
        """
        if self.best:
            return self.best["step"] if self.best["metric"] == f"eval_{metric}" else None
        values = [(row["eval_loss"], row["step"]) for row in self.evals if "eval_loss" in row]
        return min(values)[1] if metric == "loss" and len(values) > 1 else None

    def typical(self, name: str) -> float:
        """The median of a rate over the logged lines, without the first, which compiles; or 0."""
        values = [row[name] for row in self.train if name in row]
        return float(np.median(values[1:] or values or [0.0]))


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """The run in a folder, which may be a URL; a FileNotFoundError if it holds none."""
    root = epath.Path(workdir)
    config = read_json(root / "run_config.json")
    if not config:
        raise FileNotFoundError(
            f"{root} holds no run (no run_config.json there); name the --workdir of a run, or "
            f"train one with: python scripts/train.py --config=NAME --workdir={root}"
        )
    kept = saved_steps(root)
    meta = read_json(root / FOLDER / str(kept[-1]) / "meta" / "metadata") if kept else {}
    rows = read_metrics(root / "metrics.jsonl")
    tables = sorted((root / "evaluations").glob("*.npz"))
    data_dir = config["data"]["data_dir"]
    packed = epath.Path(data_dir) / "packed" / meta.get("packed", "none")
    heartbeat = read_json(root / "heartbeat.json")
    return Run(
        root=root,
        config=config,
        rows=rows,
        train=[row for row in rows if row["split"] == "train"],
        evals=[row for row in rows if row["split"] == "eval"],
        kept=kept,
        meta=meta,
        starts=read_json(root / "run_info.json").get("starts", []),
        best=read_json(root / "best.json"),
        ended=heartbeat.get("doing") == "done" or kept[-1:] == [meta.get("total_steps")],
        total_steps=meta.get("total_steps") or heartbeat.get("total_steps") or 0,
        pairs=load_table(tables[-1]) if tables else None,
        prepared={
            name: _prepared_report(data_dir, name)
            for name in weighted("data.dataset", config["data"]["dataset"])
        },
        packed=read_json(packed / "manifest.json"),
    )


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    return storage.read_json(path) if epath.Path(path).is_file() else {}


def _prepared_report(data_dir: str, name: str) -> dict[str, Any]:
    try:
        return read_json(set_folder(data_dir, name) / "report.json")
    except FileNotFoundError:
        return {}


def write_run_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Writes `workdir/report.html` from what the run has written so far; returns its path."""
    run = read_run(workdir)
    page = Page(f"{run.config['name']}: run report")
    sets = ", ".join(run.prepared)
    page.text(f"{run.kind} on {sets}, {run.config['data']['splits'][0]}. {run.progress}")
    _add_facts(page, run)
    _add_headline(page, run)
    for title, add_section in (
        ("Learning curves", add_learning),
        ("Evaluation on the held-out split", add_heldout),
        ("Benchmarks", _add_benchmarks),
        ("Sample replies", lambda page, run: add_samples(page, run.root)),
        ("Throughput", lambda page, run: page.figures(speed_plots(run))),
        ("Data", add_data),
        ("Configuration", add_configuration),
        ("Lineage", _add_lineage),
    ):
        page.heading(title)
        add_section(page, run)
    page.write(run.root / "report.html")
    return run.root / "report.html"


def _add_facts(page: Page, run: Run) -> None:
    """Adds when, where and by which code the run was computed, by its last start."""
    if not run.starts:  # of a version that did not store it
        page.facts({"Run folder": str(run.root)})
        return
    last = run.starts[-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    hosts = f" and {last['processes'] - 1} more" if last["processes"] > 1 else ""
    page.facts(
        {
            "Started": run.starts[0]["date"],
            "Host": last["host"] + hosts,
            "Devices": f"{last['devices']} ({last['backend']})",
            "Commit": last["commit"] or "not from a Git checkout",
            "Run folder": str(run.root),
            "Versions": versions,
        }
    )
    if len(run.starts) > 1:
        rows = [[start[key] for key in _START] for start in run.starts]
        page.details(f"Started {len(run.starts)} times").table(list(_START), rows, len(_START))


def _add_headline(page: Page, run: Run) -> None:
    first, last = run.evals[:1], run.evals[-1:]
    name = run.best.get("metric", "eval_loss")
    step = run.best_step(name.removeprefix("eval_"))
    best = [row for row in run.evals if row["step"] == step]
    losses = {f"step {row['step']:,}": shown(row["eval_loss"]) for row in first + last}
    by = f" by {name.removeprefix('eval_')}" if name != "eval_loss" else ""
    losses |= {f"best{by}, step {row['step']:,}": shown(row[name]) for row in best}
    tiles = {"Held-out loss": list(losses.items())} if losses else {}
    if run.beta:
        tiles["Held-out accuracy"] = [
            (f"{words}, step {row['step']}", percent(row[name]))
            for words, name, rows in (
                ("by log-likelihood", "eval_logps/accuracies", first),
                ("by implicit reward", "eval_rewards/accuracies", last),
            )
            for row in rows
            if name in row
        ]
    rates = [(label, run.typical(name)) for label, name in _RATES.items()]
    tiles["Throughput (median)"] = [
        (label, f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}") for label, rate in rates if rate
    ]
    end = run.train[-1] if run.train else {}
    wall = end.get("wall_s") or end.get("elapsed_s")
    goodput = end.get("productive_s", 0.0) / wall if wall else 0.0
    tiles["Time"] = [("wall clock, all starts", duration(wall))] if wall else []
    shares = [("goodput", goodput), ("MFU", run.typical("mfu"))]
    tiles["Time"] += [(label, percent(share)) for label, share in shares if share]
    page.tiles(tiles)


def add_learning(page: Page, run: Run) -> None:
    """Adds the curves of a run."""
    if run.rows:
        page.figures(learning_plots(run))
    else:
        page.text("No metrics yet.", "missing")


def add_heldout(page: Page, run: Run) -> None:
    """Adds a table of up to six evaluations, the last one by source, and how the rewards lie."""
    evals = run.evals
    if not evals:
        held_out = run.config["data"]["splits"][1]
        why = "Not evaluated yet." if held_out else "The run holds no split out (data.splits)."
        page.text(why, "missing")
        return
    spaced = np.linspace(0, len(evals) - 1, min(len(evals), _COLUMNS)).round().astype(int)
    rows = [evals[i] for i in spaced]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval_"))
    cells = [
        [name.removeprefix("eval_"), *(shown(row[name]) if name in row else "" for row in rows)]
        for name in names
        if not name.startswith("eval_source/")
    ]
    head = ["", *(f"step {row['step']:,}" for row in rows)]
    page.table(head, cells, 1, f"{len(rows)} of {len(evals)} evaluations")
    _add_sources(page, evals[-1])
    if run.pairs is not None and (run.pairs.logps != run.pairs.ref_logps).any():
        page.figures(reward_plots(run.pairs, run.beta))


def _add_sources(page: Page, row: dict[str, Any]) -> None:
    """Adds the main numbers of each source: `eval_source/NAME/loss` and so on."""
    by_name: dict[str, dict[str, str]] = {}
    for key, value in row.items():
        for metric in _OF_SOURCES:
            if key.startswith("eval_source/") and key.endswith(f"/{metric}"):
                source = key.removeprefix("eval_source/").removesuffix(f"/{metric}")
                number = f"{value:,.0f}" if metric == "pairs" else shown(value)
                by_name.setdefault(source, {})[metric] = number
    rows = [
        [source, *(own.get(metric, "") for metric in _OF_SOURCES)]
        for source, own in by_name.items()
    ]
    if rows:
        page.table(["source", *_OF_SOURCES], rows, 1, f"By source, at step {row['step']:,}")


def _add_benchmarks(page: Page, run: Run) -> None:
    """Adds what `evaluate` wrote to `evaluations/*.json`, next to published numbers."""
    files = sorted((run.root / "evaluations").glob("*.json"))
    if not files:
        page.text("evaluate.py --output=WORKDIR/evaluations/NAME.json adds results.", "missing")
        return
    ours = read_results(files)
    head, *rows = table_rows(ours)
    page.table(head, rows, 1)
    for entry in ours:
        for text in entry.settings:
            page.text(f"{entry.model}: {text}", "soft")


def add_data(page: Page, run: Run) -> None:
    """Adds what became of the records of the run's sets, and of its packed rows."""
    gone = f"is not in {run.config['data']['data_dir']} any more."
    for name, report in run.prepared.items():
        page.heading(name, 3)
        if report:
            add_prepared_set(page, report)
        else:
            page.text(f"The prepared set {gone}", "missing")
    page.heading("Packed rows", 3)
    if run.packed:
        add_packed_set(page, run.packed)
    else:
        page.text(f"The packed set {gone}" if run.meta else "No checkpoint yet.", "missing")


def add_configuration(page: Page, run: Run) -> None:
    """Adds the fields that differ from the recipe of the same name, and all fields."""
    own, name = flat(run.config), run.config["name"]
    try:
        recipe = flat(json.loads(json.dumps(load_config(name).to_dict())))  # as stored
    except FileNotFoundError:
        page.text(f"No recipe named {name} ships with zephyr_jax {__version__}.", "missing")
    else:
        pairs = [(field, recipe.get(field, "-"), own.get(field, "-")) for field in recipe | own]
        rows = [
            [field, *(cut(str(value)) or "(empty)" for value in (theirs, ours))]
            for field, theirs, ours in pairs
            if theirs != ours
        ]
        caption = f"{len(rows)} of {len(own)} fields differ from the recipe {name} of zephyr_jax "
        page.table(["field", "recipe", "this run"], rows, 3, caption + __version__)
    fields = page.details(f"All {len(own)} fields")
    fields.code("\n".join(f"{name} = {value!r}" for name, value in own.items()))


def _add_lineage(page: Page, run: Run) -> None:
    if not run.meta:
        page.text("There is no checkpoint yet, so the model's origin is not stored.", "missing")
        return
    rows = [[f"stage {i}", line] for i, line in enumerate(run.meta.get("lineage", []), 1)]
    rows += [[words, str(run.meta[key])] for key, words in _LINEAGE.items() if key in run.meta]
    rows.append(["folder", str(run.root)])
    rows.append(["checkpoints kept", ", ".join(f"{step:,}" for step in run.kept)])
    page.table(["", ""], rows, 2)
