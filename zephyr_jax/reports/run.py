"""A run's folder, and its report: what was learned from what, how fast; finished or not."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from zephyr_jax import storage
from zephyr_jax._version import __version__
from zephyr_jax.config import weighted
from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation.evaluate import shown
from zephyr_jax.evaluation.metrics_file import DAMAGED, read_lines, read_metrics
from zephyr_jax.evaluation.pairs import load_table
from zephyr_jax.evaluation.table import Entry, read_results, table_rows
from zephyr_jax.reports.data import add_data, add_rounds, prepared_reports
from zephyr_jax.reports.page import Page, cut, duration, percent
from zephyr_jax.reports.plots import learning_plots, reward_plots, speed_plots
from zephyr_jax.reports.samples import add_samples
from zephyr_jax.weights.checkpoint import FOLDER, check_step, saved_steps, workdir_and_steps

_COLUMNS = 6  # evaluations in the table
_OF_SOURCES = ("loss", "rewards/accuracies", "rewards/margins")
_RATES = {
    "target tokens/s": "target_tokens_per_s",
    "non-padding tokens/s": "tokens_per_s",
    "pairs/s": "pairs_per_s",
}
_LINEAGE = ("init_digest", "dataset_digest", "packed", "reference_digest")


class Run:
    """A run as it stands in its folder or behind a URL; a FileNotFoundError if there is none."""

    def __init__(self, workdir: str | os.PathLike[str]):
        self.root = root = epath.Path(workdir)
        self.config = read_json(root / "run_config.json")
        if not self.config:
            raise FileNotFoundError(
                f"{root} holds no run (no run_config.json there); name the --workdir of a run, or "
                f"train one with: python scripts/train.py --config=NAME --workdir={root}"
            )
        self.rows, self.damaged = read_lines(root / "metrics.jsonl")
        self.train = [row for row in self.rows if row["split"] == "train"]
        self.evals = [row for row in self.rows if row["split"] == "eval"]
        self.kept = saved_steps(root)  # whose checkpoints are there
        newest = root / FOLDER / str(self.kept[-1] if self.kept else 0)
        if self.kept:
            check_step(newest, ("meta",))
        self.meta = read_json(newest / "meta" / "metadata")  # what the newest says of the run
        heartbeat = read_json(root / "heartbeat.json")
        self.total_steps: int = self.meta.get("total_steps") or heartbeat.get("total_steps") or 0
        last = self.kept[-1:] == [self.meta.get("total_steps")]
        self.ended = last or heartbeat.get("doing") == "done"  # or evaluations were no better
        self.starts = read_json(root / "run_info.json").get("starts", [])
        self.best = read_json(root / "best.json")  # of a run with `train.keep_best`
        tables = sorted((root / "evaluations").glob("*.npz"))
        self.pairs = load_table(tables[-1]) if tables else None  # held out, as last evaluated

    @property
    def beta(self) -> float:
        """The scale of the rewards; 0 for a run that learns from dialogues."""
        return self.config["dpo"]["beta"] if self.config.get("dpo") else 0.0

    @property
    def kind(self) -> str:
        """What kind of training it is, in words."""
        if not self.beta:
            return "Supervised fine-tuning (SFT)"
        sigmoid = self.config["dpo"].get("loss", "sigmoid") == "sigmoid"
        return "Direct preference optimization (DPO)" if sigmoid else "Preference optimization"

    @property
    def progress(self) -> str:
        """A sentence on how far the run is, and where it was stopped and resumed."""
        step = max([row["step"] for row in self.rows] + self.kept, default=0)
        if not step:
            return "No step is logged yet."
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        end = "so far; the page shows an unfinished run."
        if self.ended:
            early = "; stopped early, as later evaluations were no better"
            end = f"done{early if step < self.total_steps else ''}."
        both = itertools.pairwise((row["step"], row.get("elapsed_s", 0)) for row in self.train)
        resumed = [f"{before[0]:,}" for before, after in both if after[1] < before[1]]
        if resumed:
            end += f" Stopped and resumed after step {', '.join(resumed)}."
        return f"{step:,}{of} steps {end}"

    @property
    def gaps(self) -> str:
        """Sentences on what is missing in `metrics.jsonl`; empty where nothing is."""
        out = []
        if self.damaged:
            lines = ", ".join(map(str, self.damaged))
            out.append(f"metrics.jsonl: line {lines} damaged, left out.")
        if names := ", ".join(path.name for path in sorted(self.root.glob(DAMAGED))):
            out.append(f"Lines of metrics.jsonl were damaged before; as it was then: {names}.")
        steps = [0, *(row["step"] for row in self.train)]
        every = self.config["train"]["log_every"]
        jumps = [f"{a:,} to {b:,}" for a, b in itertools.pairwise(steps) if b - a > every]
        if jumps:
            out.append(f"No line of training from step {', '.join(jumps)}.")
        return " ".join(out)

    @property
    def results(self) -> list[Entry]:
        """What `evaluate` wrote to `evaluations/*.json`."""
        return read_results(sorted((self.root / "evaluations").glob("*.json")))

    def best_step(self, metric: str) -> int | None:
        """The best of two or more evaluations, if by this metric: `train.keep_best`'s, or loss."""
        if self.best:
            return self.best["step"] if self.best["metric"] == f"eval_{metric}" else None
        losses = [(row.get("eval_loss", math.nan), row["step"]) for row in self.evals]
        values = [(loss, step) for loss, step in losses if math.isfinite(loss)]
        return min(values)[1] if metric == "loss" and len(values) > 1 else None

    def typical(self, name: str) -> float:
        """The median of a rate over the logged lines, without the first, which compiles; or 0."""
        values = [row[name] for row in self.train if name in row]
        return float(np.median(values[1:] or values or [0.0]))


def rounds(run: Run) -> list[Run]:
    """The preference runs of which each began with the one before; the given one is the last."""
    runs = [run]
    while (init := runs[0].config["init"]) and runs[0].beta:
        folder, _ = workdir_and_steps(epath.Path(init))
        if not (folder / "run_config.json").is_file():
            break
        runs.insert(0, Run(folder))
    return runs if runs[0].beta else runs[1:]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    return storage.read_checked(path) if epath.Path(path).is_file() else {}


def write_run_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Writes `workdir/report.html` from what the run has written so far; returns its path."""
    run = Run(workdir)
    page, data = Page(f"{run.config['name']}: run report"), run.config["data"]
    sets = ", ".join(weighted("data.dataset", data["dataset"]))
    page.text(f"{run.kind} on {sets}, {data['splits'][0]}. {run.progress}")
    if run.gaps:
        page.text(run.gaps, "warning")
    _add_facts(page, run)
    _add_headline(page, run)
    for title, add_section in (
        ("Learning curves", lambda page, run: page.figures(learning_plots(run))),
        ("Evaluation on the held-out split", add_heldout),
        ("Benchmarks", _add_benchmarks),
        ("Rounds of feedback", lambda page, run: add_rounds(page, rounds(run))),
        ("Sample replies", lambda page, run: add_samples(page, run.root)),
        ("Throughput", lambda page, run: page.figures(speed_plots(run))),
        ("Data", lambda page, run: add_data(page, data, run.meta)),
        ("Configuration", _add_configuration),
        ("Lineage", _add_lineage),
    ):
        page.heading(title)
        add_section(page, run)
    return page.write(run.root / "report.html")


def _add_facts(page: Page, run: Run) -> None:
    facts = {"Run folder": str(run.root)}
    if run.starts:
        last = run.starts[-1]
        others = last["processes"] - 1
        facts |= {
            "Started": ", ".join(start["date"] for start in run.starts),
            "Host": f"{last['host']} and {others} more" if others else last["host"],
            "Devices": f"{last['devices']} ({last['backend']})",
            "Commit": last["commit"] or "not from a Git checkout",
            "Versions": ", ".join(f"{name} {x}" for name, x in last["versions"].items()),
        }
    page.facts(facts)


def _add_headline(page: Page, run: Run) -> None:
    ends, name = run.evals[:1] + run.evals[-1:], run.best.get("metric", "eval_loss")
    tiles: dict[str, dict[str, str]] = {}
    if ends:
        metric = name.removeprefix("eval_")
        losses = {f"step {row['step']:,}": shown(row["eval_loss"]) for row in ends}
        words = "best" if metric == "loss" else f"best by {metric}"
        best = [row for row in run.evals if row["step"] == run.best_step(metric)]
        losses |= {f"{words}, step {row['step']:,}": shown(row[name]) for row in best}
        tiles["Held-out loss"] = losses
    if run.beta:
        measured = {"logps": "by log-likelihood", "rewards": "by implicit reward"}
        tiles["Held-out accuracy"] = {
            f"{words}, step {row['step']}": percent(row[f"eval_{name}/accuracies"])
            for (name, words), row in zip(measured.items(), ends, strict=False)
            if f"eval_{name}/accuracies" in row
        }
    rates = {label: run.typical(name) for label, name in _RATES.items()}
    tiles["Throughput (median)"] = {
        label: f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for label, x in rates.items() if x
    }
    end = run.train[-1] if run.train else {}
    wall = end.get("wall_s") or end.get("elapsed_s") or 0.0
    tiles["Time"] = {"wall clock, all starts": duration(wall)} if wall else {}
    goodput = end.get("productive_s", 0.0) / wall if wall else 0.0
    shares = {"goodput": goodput, "MFU": run.typical("mfu")}
    tiles["Time"] |= {label: percent(share) for label, share in shares.items() if share}
    page.tiles(tiles)


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
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    cells = [
        [name.removeprefix("eval_"), *(shown(row[name]) if name in row else "" for row in rows)]
        for name in names
        if not name.startswith("eval_source/")
    ]
    head = ["", *(f"step {row['step']:,}" for row in rows)]
    page.table(head, cells, 1, f"{len(rows)} of {len(evals)} evaluations")
    last, rows = evals[-1], []
    for name in names:
        if own := re.fullmatch("(eval_source/(.+)/)pairs", name):
            values = [last.get(own[1] + name) for name in _OF_SOURCES]
            cells = ["" if value is None else shown(value) for value in values]
            rows.append([own[2], f"{last[name]:,.0f}", *cells])
    if rows:
        head = ["source", "pairs", *_OF_SOURCES]
        page.table(head, rows, 1, f"By source, at step {last['step']:,}")
    page.figures(reward_plots(run))


def _add_benchmarks(page: Page, run: Run) -> None:
    ours = run.results
    if not ours:
        page.text("evaluate.py --output=WORKDIR/evaluations/NAME.json adds results.", "missing")
        return
    head, *rows = table_rows(ours)
    page.table(head, rows, 1)
    for entry in ours:
        for text in entry.settings:
            page.text(f"{entry.model}: {text}", "soft")


def _add_configuration(page: Page, run: Run) -> None:
    own, name = flatten_dict(run.config, sep="."), run.config["name"]
    try:
        recipe = flatten_dict(json.loads(json.dumps(load_config(name).to_dict())), sep=".")
    except FileNotFoundError:
        page.text(f"No recipe named {name} ships with zephyr_jax {__version__}.", "missing")
    else:
        rows = [
            [field, *(cut(str(fields.get(field, "-"))) or "(empty)" for fields in (recipe, own))]
            for field in recipe | own
            if recipe.get(field, "-") != own.get(field, "-")
        ]
        caption = f"{len(rows)} of {len(own)} fields differ from the recipe {name} of zephyr_jax "
        page.table(["field", "recipe", "this run"], rows, 3, caption + __version__)
    fields = page.details(f"All {len(own)} fields")
    fields.text("\n".join(f"{name} = {value!r}" for name, value in own.items()), "code")


def _add_lineage(page: Page, run: Run) -> None:
    if not run.meta:
        page.text("There is no checkpoint yet, so the model's origin is not stored.", "missing")
        return
    rows = [[f"stage {i}", line] for i, line in enumerate(run.meta.get("lineage", []), 1)]
    rows += [[x.replace("_", " "), str(run.meta[x])] for x in _LINEAGE if x in run.meta]
    rows.append(["folder", str(run.root)])
    rows.append(["checkpoints kept", ", ".join(f"{step:,}" for step in run.kept)])
    page.table(["", ""], rows, 2)


def model_card_fields(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """What `weights.exports` tells of a model that came from `source` with this `Model.lineage`."""
    card: dict[str, Any] = {"lineage": lineage["lineage"]}
    base = re.search(r"^ported from ([^/@ ]+/[^/@ ]+)@[0-9a-f]{40}$", lineage["lineage"][0])
    if base:
        card["base_model"] = base[1]
        if base[1].startswith("mistralai/Mistral-7B-"):
            card["license"] = "apache-2.0"
    config = lineage.get("config")
    if not config:
        return card
    data = config["data"]
    digests = {f"{data['dataset']} {data['splits'][0]}": lineage["dataset_digest"]}
    digests["packed set"] = lineage["packed"]
    if "reference_digest" in lineage:
        digests["reference"] = lineage["reference_digest"]
    card |= {"recipe": config, "data": digests}
    with contextlib.suppress(OSError, ValueError):  # a prepared set may be damaged by now
        origins = [report.get("origin") or "" for report in prepared_reports(data).values()]
        card["datasets"] = [origin.split("@")[0] for origin in origins if origin]
    workdir, _ = workdir_and_steps(epath.Path(source))
    for row in read_metrics(workdir / "metrics.jsonl"):
        if (row.pop("split"), row.pop("step")) == ("eval", lineage["step"]):
            card["metrics"] = row
    return card
