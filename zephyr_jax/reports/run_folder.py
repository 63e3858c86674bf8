"""What lies in a run's folder and beside it: configuration, metrics, checkpoints, its data."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
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
ABSENT = "\N{EN DASH}"  # of a field that a configuration does not have


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it stands; what is not there yet is empty. Its files may be of an older version."""

    root: epath.Path
    config: dict[str, Any]  # as `run_config.json` has it
    rows: list[Row]  # of `metrics.jsonl`
    kept: list[int]  # steps whose checkpoints are there
    meta: dict[str, Any]  # what is saved beside the newest of them
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
    def train(self) -> list[Row]:
        """The lines of steps."""
        return [row for row in self.rows if row["split"] == "train"]

    @property
    def evals(self) -> list[Row]:
        """The lines of evaluations."""
        return [row for row in self.rows if row["split"] == "eval"]

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([row["step"] for row in self.rows] + self.kept, default=0)

    @property
    def total_steps(self) -> int:
        """How many steps were planned; 0 where nothing says it yet."""
        return self.meta.get("total_steps") or self.heartbeat.get("total_steps") or 0

    @property
    def starts(self) -> list[int]:
        """Steps at which it went on after a stop, so far as its clock shows it."""
        seconds = [(row["step"], row["elapsed_s"]) for row in self.train if "elapsed_s" in row]
        both = itertools.pairwise(seconds)
        return [before[0] for before, after in both if after[1] < before[1]]

    def typical(self, name: str) -> float | None:
        """The median of a rate over the logged lines but the first, which compiles."""
        values = [row[name] for row in self.train if name in row]
        return float(np.median(values[1:] or values)) if values else None

    def seconds(self) -> tuple[float, float | None]:
        """Wall time over all starts, and the share of it that was spent inside steps."""
        last = self.train[-1] if self.train else {}
        if last.get("wall_s"):
            return last["wall_s"], last.get("productive_s", 0.0) / last["wall_s"]
        return sum(self._elapsed()), last.get("goodput")

    def _elapsed(self) -> list[float]:
        """Seconds of each start, up to its last line."""
        seconds = [row["elapsed_s"] for row in self.train if "elapsed_s" in row]
        return [before for before, after in itertools.pairwise([*seconds, -1.0]) if after < before]

    def pairs(self) -> PairTable | None:
        """The held-out pairs as last evaluated, if it learns from pairs."""
        tables = sorted((self.root / "evaluations").glob("*.npz"))
        return load_table(tables[-1]) if tables else None


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """The run in a folder, which may be a URL.

    Raises:
        FileNotFoundError: if no run was begun there.
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
    """An object from a file, empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def packed_manifest(run: Run) -> dict[str, Any]:
    """The manifest of the run's packed set; empty where the set is not to be found."""
    home = epath.Path(run.config["data"]["data_dir"]) / "packed"
    return read_json(home / run.meta["packed"] / "manifest.json") if run.meta else {}


def prepared_reports(run: Run) -> dict[str, dict[str, Any]]:
    """`report.json` of each set that the run takes records from; empty where it is gone."""
    data, out = run.config["data"], {}
    for name in weighted("data.dataset", data["dataset"]):
        try:
            out[name] = read_json(set_folder(data["data_dir"], name) / "report.json")
        except FileNotFoundError:
            out[name] = {}
    return out


def recipe_of(run: Run) -> dict[str, Any] | None:
    """The fields of the recipe that the run is named after; None if none of that name ships."""
    if not re.fullmatch(r"\w+", run.name):
        return None
    try:
        return flat(load_config(f"configs/{run.name}.py").to_dict())
    except FileNotFoundError:
        return None


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Field -> its value in each of some flat configurations, in words, where they differ.

    A section that only some have is one field; its own are compared among those.
    """
    named = dict.fromkeys(name for config in configs for name in config)
    out = {}
    for name in named:
        section = name.split(".")[0]
        having = [config for config in configs if section not in config or section == name]
        values = [config[name] for config in having if name in config]
        if len(values) < len(having) or any(value != values[0] for value in values):
            out[name] = [_in_words(config, name) for config in configs]
    return out


def _in_words(config: dict[str, Any], name: str) -> str:
    if name not in config:
        return "given" if any(key.startswith(f"{name}.") for key in config) else ABSENT
    value = config[name]
    return "none" if value is None else str(value) or "(empty)"
