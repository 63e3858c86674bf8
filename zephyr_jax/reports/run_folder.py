"""What a run's folder holds: configuration, metrics, checkpoints; and where its data are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import Any

import numpy as np
from etils import epath

from zephyr_jax.config.checks import weighted
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.mixture import set_folder
from zephyr_jax.evaluation.pairs import PairTable, load_table
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.workdir import flat
from zephyr_jax.weights.checksums import FOLDER, saved_steps

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it stands; what is not written yet, or gone, is empty."""

    root: epath.Path
    config: dict[str, Any]  # as `run_config.json` has it
    rows: list[Row]  # of `metrics.jsonl`
    train: list[Row]  # those of training steps
    evals: list[Row]  # those of evaluations
    kept: list[int]  # steps whose checkpoints are there
    meta: dict[str, Any]  # what the newest of them says of the run
    total_steps: int  # 0 if not written yet
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
        words = (
            f"{step:,} of {self.total_steps:,} steps " if self.total_steps else f"{step:,} steps "
        )
        words += (
            "done." if step == self.total_steps else "so far; the page shows an unfinished run."
        )
        both = itertools.pairwise((row["step"], row.get("elapsed_s", 0)) for row in self.train)
        resumed = [f"{before[0]:,}" for before, after in both if after[1] < before[1]]
        return words + (f" Stopped and resumed after step {', '.join(resumed)}." if resumed else "")

    def typical(self, name: str) -> float:
        """The median of a rate over the logged lines, without the first, which compiles; or 0."""
        values = [row[name] for row in self.train if name in row]
        return float(np.median(values[1:] or values or [0.0]))


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """The run in a folder, which may be a URL.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
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
        total_steps=meta.get("total_steps") or heartbeat.get("total_steps") or 0,
        pairs=load_table(tables[-1]) if tables else None,
        prepared={
            name: _prepared_report(data_dir, name)
            for name in weighted("data.dataset", config["data"]["dataset"])
        },
        packed=read_json(packed / "manifest.json"),
    )


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _prepared_report(data_dir: str, name: str) -> dict[str, Any]:
    try:
        return read_json(set_folder(data_dir, name) / "report.json")
    except FileNotFoundError:
        return {}


def changed_fields(run: Run) -> list[tuple[str, str, str]] | None:
    """(field, value in the recipe that the run is named after, the run's own) where they differ.

    None if no recipe of that name ships.
    """
    try:
        recipe = load_config(run.config["name"]).to_dict()
    except FileNotFoundError:
        return None
    own, recipe = flat(run.config), flat(json.loads(json.dumps(recipe)))  # as stored
    absent = "\N{EN DASH}"
    pairs = ((name, recipe.get(name, absent), own.get(name, absent)) for name in recipe | own)
    return [(name, _value(theirs), _value(ours)) for name, theirs, ours in pairs if theirs != ours]


def _value(value: Any) -> str:
    return "none" if value is None else str(value) or "(empty)"
