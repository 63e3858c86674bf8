"""What a run's folder holds: configuration, metrics, checkpoints; and where its data are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
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
    """A run as it stands; what is not written yet is empty."""

    root: epath.Path
    config: dict[str, Any]  # as `run_config.json` has it
    rows: list[Row]  # of `metrics.jsonl`
    kept: list[int]  # steps whose checkpoints are there
    meta: dict[str, Any]  # what the newest of them says of the run
    heartbeat: dict[str, Any]

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.config["name"]

    @property
    def preferences(self) -> bool:
        """Whether it learns from pairs."""
        return bool(self.config.get("dpo"))

    @property
    def sigmoid(self) -> bool:
        """Whether its loss is DPO's own, whose value means something where nothing is preferred."""
        return self.preferences and self.config["dpo"].get("loss", "sigmoid") == "sigmoid"

    @property
    def train(self) -> list[Row]:
        """The lines of steps."""
        return [row for row in self.rows if row["split"] == "train"]

    @property
    def evals(self) -> list[Row]:
        """The lines of evaluations."""
        return [row for row in self.rows if row["split"] == "eval"]

    @property
    def ends(self) -> tuple[Row, Row]:
        """The first and the last evaluation; empty if there is none yet."""
        evals = self.evals or [{}]
        return evals[0], evals[-1]

    @property
    def step(self) -> int:
        """The last step that is logged or saved."""
        return max([row["step"] for row in self.rows] + self.kept, default=0)

    @property
    def kind(self) -> str:
        """What kind of training it is, in words."""
        if self.sigmoid:
            return "Direct preference optimization (DPO)"
        return "Preference optimization" if self.preferences else "Supervised fine-tuning (SFT)"

    @property
    def progress(self) -> str:
        """A sentence on how far the run is, and where it was stopped and resumed."""
        total = self.meta.get("total_steps") or self.heartbeat.get("total_steps")
        if not self.step:
            return "No step is logged yet."
        words = f"{self.step:,} of {total:,} steps " if total else f"{self.step:,} steps "
        words += "done." if self.step == total else "so far; the page shows an unfinished run."
        both = itertools.pairwise((row["step"], row.get("elapsed_s", 0)) for row in self.train)
        resumed = [f"{before[0]:,}" for before, after in both if after[1] < before[1]]
        return words + (f" Stopped and resumed after step {', '.join(resumed)}." if resumed else "")

    def typical(self, name: str) -> float | None:
        """The median of a rate over the logged lines, without the first, which compiles."""
        values = [row[name] for row in self.train if name in row]
        return float(np.median(values[1:] or values)) if values else None

    def seconds(self) -> tuple[float, float | None]:
        """Wall time over all starts, and the share of it that was spent inside steps."""
        last = self.train[-1] if self.train else {}
        if last.get("wall_s"):
            return last["wall_s"], last.get("productive_s", 0.0) / last["wall_s"]
        return last.get("elapsed_s", 0.0), last.get("goodput")

    def pairs(self) -> PairTable | None:
        """The held-out pairs as last evaluated, if it learns from pairs."""
        tables = sorted((self.root / "evaluations").glob("*.npz"))
        return load_table(tables[-1]) if tables else None


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """The run in a folder, which may be a URL.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    root = epath.Path(workdir)
    if not (root / "run_config.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no run (no run_config.json there); name the --workdir of a run, or "
            f"train one with: python scripts/train.py --config=NAME --workdir={root}"
        )
    kept = saved_steps(root)
    meta = read_json(root / FOLDER / str(kept[-1]) / "meta" / "metadata") if kept else {}
    rows = read_metrics(root / "metrics.jsonl")
    heartbeat = read_json(root / "heartbeat.json")
    return Run(root, read_json(root / "run_config.json"), rows, kept, meta, heartbeat)


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def packed_manifest(run: Run) -> dict[str, Any]:
    """The manifest of the run's packed set; empty if the set is gone."""
    home = epath.Path(run.config["data"]["data_dir"]) / "packed"
    return read_json(home / run.meta["packed"] / "manifest.json") if run.meta else {}


def prepared_reports(run: Run) -> dict[str, dict[str, Any]]:
    """`report.json` of each prepared set of the run; empty if the set is gone."""
    data, out = run.config["data"], {}
    for name in weighted("data.dataset", data["dataset"]):
        try:
            out[name] = read_json(set_folder(data["data_dir"], name) / "report.json")
        except FileNotFoundError:
            out[name] = {}
    return out


def changed_fields(run: Run) -> list[tuple[str, str, str]] | None:
    """(field, value in the recipe that the run is named after, the run's own) where they differ.

    None if no recipe of that name ships.
    """
    if not re.fullmatch(r"\w+", run.name):
        return None
    try:
        recipe = flat(json.loads(json.dumps(load_config(run.name).to_dict())))  # as stored
    except FileNotFoundError:
        return None
    own = flat(run.config)
    absent = "\N{EN DASH}"
    pairs = ((name, recipe.get(name, absent), own.get(name, absent)) for name in recipe | own)
    return [(name, _value(theirs), _value(ours)) for name, theirs, ours in pairs if theirs != ours]


def _value(value: Any) -> str:
    return "none" if value is None else str(value) or "(empty)"
