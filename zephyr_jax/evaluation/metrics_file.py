"""`metrics.jsonl`: what a run measured, a line for each step and split; and its best step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.config import choose
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import TrainConfig
from zephyr_jax.data.prepare.prepare import report, set_folder
from zephyr_jax.evaluation.pairs import LABEL_METRICS, PAIR_METRICS
from zephyr_jax.storage import is_remote, write_atomic
from zephyr_jax.weights.checkpoint import workdir_and_steps

_REWRITE = 10.0  # seconds between two writes of a metrics.jsonl in a bucket, at least


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line with "step" and "split"; only process 0 writes.

    A resumed run first drops the lines of steps that it is about to repeat. In a bucket, where
    nothing can be appended, the whole object is rewritten, by `flush` and every ten seconds.
    `trackers` get every new line too. `kept` are the lines that stay, and `before` holds the
    seconds that earlier starts of the run took, and those inside steps; steps that were lost were
    not productive.
    """

    def __init__(self, path: epath.Path, resume_step: int, trackers: Sequence[Any] = ()):
        self._path, rows, self._trackers = path, read_metrics(path), trackers
        self.kept = kept = [row for row in rows if row["step"] <= resume_step]
        self._seen = {(row["step"], row["split"]) for row in kept}
        self.before = (
            max((row.get("wall_s", 0.0) for row in rows), default=0.0),
            max((row.get("productive_s", 0.0) for row in kept), default=0.0),
        )
        self._text = "".join(json.dumps(row) + "\n" for row in kept)
        self._remote, self._written = is_remote(path), time.monotonic()
        if not jax.process_index():
            write_atomic(path, self._text)

    def has(self, step: int, split: str) -> bool:
        """Whether an earlier start of the run wrote this line."""
        return (step, split) in self._seen

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Adds one line."""
        if jax.process_index():
            return
        row = {"step": step, "split": split} | {k: float(f"{v:.7g}") for k, v in values.items()}
        line = json.dumps(row) + "\n"
        if self._remote:
            self._text += line
            if time.monotonic() - self._written > _REWRITE:
                self.flush()
        else:
            with self._path.open("a") as file:
                file.write(line)
        for tracker in self._trackers:
            tracker.log(step, split, values)

    def flush(self) -> None:
        """Writes the lines that are pending because the file is in a bucket."""
        if self._remote and not jax.process_index():
            write_atomic(self._path, self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is pending, here and in the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut off by a kill is left out.

    A ValueError names another line that is damaged.
    """
    rows, path = [], epath.Path(path)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], "split": row["split"]} | row)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}, is damaged: restore the file, or remove that line"
                ) from error
    return rows


def check_best(train: TrainConfig, steps: int, dpo: DpoConfig | None) -> None:
    """Raises a ValueError if `train.keep_best` names what a run of `steps` steps will not measure.

    `steps` is 0 where nothing is held out.
    """
    wanted, _ = train.best_and_patience
    if not wanted:
        return
    if not 0 < train.eval_every < steps:
        raise ValueError(
            f"train.keep_best={wanted} needs evaluations on the way: a held-out split, "
            f"and train.eval_every (now {train.eval_every}) between 0 and the run's {steps} steps"
        )
    direction, _, name = wanted.rpartition(":")
    choose("train.keep_best", direction, ("", "min", "max"))
    measured = ("loss",)
    if dpo:
        measured = LABEL_METRICS if dpo.labeled else PAIR_METRICS
    choose("train.keep_best", name.removeprefix("eval_"), measured)


class BestStep:
    """The saved step with the best held-out value so far, for `train.keep_best`.

    That is the name of a metric of the "eval" lines in metrics.jsonl, without `eval_`: of a
    loss or `kl` the lowest value is best, of all else the highest, unless `min:` or `max:` stands
    before it; "" for none. Step 0 does not count. `best.json` in the workdir holds the step, the
    metric (`eval_loss`) and its value, and `checkpoints/best` is that step's checkpoint wherever a
    model is named. `since` counts the evaluations after it.
    """

    def __init__(
        self,
        workdir: epath.Path,
        train: TrainConfig,
        rows: Sequence[dict[str, Any]] = (),
        saved: Sequence[int] = (),
    ):
        wanted, self._patience = train.best_and_patience
        direction, _, name = wanted.rpartition(":")
        self._path, self._name = workdir / "best.json", f"eval_{name.removeprefix('eval_')}"
        low = "loss" in name or name.endswith("kl")
        self._sign = {"min": -1.0, "max": 1.0}.get(direction, -1.0 if low else 1.0)
        self.step, self.since, self._value = 0, 0, -math.inf
        if not wanted:
            return
        for row in rows:
            if row["split"] == "eval" and row["step"] and self._name in row:
                self._count(row["step"], row[self._name], row["step"] in saved)
        # Process 0 reads for all: a file may be older where other hosts see it.
        state = np.asarray([self.step, self.since, self._value], np.float32)
        if jax.process_count() > 1:
            state = multihost_utils.broadcast_one_to_all(state)
        self.step, self.since, self._value = int(state[0]), int(state[1]), float(state[2])
        self._write()

    @property
    def ends_run(self) -> bool:
        """Whether as many evaluations as `train.keep_best` says were no better."""
        return 0 < self._patience <= self.since

    def after(self, step: int, means: Mapping[str, float]) -> bool:
        """Whether these held-out means are the best so far: then `step` is to be kept."""
        if self._name not in means or not step:
            return False
        better = self._count(step, means[self._name])
        if better:
            self._write()
        return better

    def _count(self, step: int, value: float, saved: bool = True) -> bool:
        value = self._sign * float(np.float32(f"{value:.7g}"))  # as a resumed run reads it
        better = saved and value > self._value
        if better:
            self.step, self.since, self._value = step, 0, value
        else:
            self.since += 1
        return better

    def _write(self) -> None:
        best = {"step": self.step, "metric": self._name, "value": self._sign * self._value}
        if jax.process_index():
            return
        if self.step:
            write_atomic(self._path, json.dumps(best) + "\n")
        else:
            self._path.unlink(missing_ok=True)


def learned(rows: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """What a run learned by its metrics in a few words, and whether its loss fell.

    The first and the last held-out values, or those in training where nothing is held out. In the
    accuracy of preferences a tie counts one half.
    """
    for split, words in (("eval", "held-out"), ("train", "training")):
        lines = [row for row in rows if row["split"] == split]
        if len(lines) < 2:
            continue
        prefix = "eval_" if split == "eval" else ""
        losses = [line[f"{prefix}loss"] for line in (lines[0], lines[-1])]
        text = f"{words} loss {losses[0]:.4f} -> {losses[1]:.4f}"
        name, ties = f"{prefix}rewards/accuracies", f"{prefix}rewards/ties"
        if name in lines[0]:
            first, last = (line[name] + line.get(ties, 0) / 2 for line in (lines[0], lines[-1]))
            text += f", accuracy {first:.2f} -> {last:.2f}"
        return text, losses[1] < losses[0]
    return "too few lines of metrics to say what was learned", True


def model_card_fields(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """Lineage, base, recipe, data sets and metrics of a model, as `weights.exports` takes them.

    `source` is where the model was loaded from, `lineage` its `Model.lineage`.
    """
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
    names = [data["dataset"]] if isinstance(data["dataset"], str) else list(data["dataset"])
    with contextlib.suppress(OSError, ValueError):  # the prepared sets may be elsewhere by now
        folders = (set_folder(data["data_dir"], name) for name in names)
        origins = [report(folder).get("origin") or "" for folder in folders]
        card["datasets"] = [origin.split("@")[0] for origin in origins if origin]
    workdir, _ = workdir_and_steps(epath.Path(source))
    for row in read_metrics(workdir / "metrics.jsonl"):
        if (row.pop("split"), row.pop("step")) == ("eval", lineage["step"]):
            card["metrics"] = row
    return card
