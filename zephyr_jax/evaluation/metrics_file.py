"""`metrics.jsonl`: what a run measured, a line for each step and split; its best step; trackers."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.config import choose
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import RunConfig, TrainConfig
from zephyr_jax.evaluation.pairs import LABEL_METRICS, PAIR_METRICS
from zephyr_jax.storage import is_remote, naming, read_checked, write_atomic, write_checked

DAMAGED = "metrics.damaged-*.jsonl"  # in the workdir: files as they were when lines were damaged
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_REWRITE = 10.0  # seconds between two writes of a metrics.jsonl in a bucket, at least


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line with "step" and "split"; only process 0 writes.

    A resumed run first drops the lines of steps that it is about to repeat. A file in a bucket is
    rewritten as a whole, now and then. `kept` are the lines that stay, `before` the seconds of
    earlier starts, and those inside steps that are kept.
    """

    def __init__(self, path: epath.Path, resume_step: int, config: RunConfig | None = None):
        rows, damaged = read_lines(path)
        self._path, self._remote = path, is_remote(path)
        self._trackers = open_trackers(config, path.parent) if config else []
        self._sent = {(row["step"], row["split"]) for row in rows}
        self.kept = [row for row in rows if row["step"] <= resume_step]
        self.before = (
            max((row.get("wall_s", 0.0) for row in rows), default=0.0),
            max((row.get("productive_s", 0.0) for row in self.kept), default=0.0),
        )
        self._text, self._written = "".join(map(_line, self.kept)), time.monotonic()
        if jax.process_index():
            return
        if damaged:
            n = len(list(path.parent.glob(DAMAGED))) + 1
            copy = write_atomic(path.with_name(DAMAGED.replace("*", str(n))), path.read_bytes())
            logging.warning("the file with its damaged lines is kept as %s", copy)
        write_atomic(path, self._text)

    def has(self, step: int, split: str) -> bool:
        """Whether this line of an earlier start is kept."""
        return any((row["step"], row["split"]) == (step, split) for row in self.kept)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds one line."""
        if jax.process_index():
            return
        line = _line({"step": step, "split": split} | dict(values))
        if self._remote:
            self._text += line
            if time.monotonic() - self._written > _REWRITE:
                self.flush()
        else:
            with naming(self._path), self._path.open("a") as file:
                file.write(line)
        if (step, split) not in self._sent:
            named = {f"{split}/{key.removeprefix('eval_')}": x for key, x in values.items()}
            for tracker in self._trackers:
                tracker.log(step, named)

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


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON: seven digits, null for what is not finite, and a CRC-32 of the rest."""
    out: dict[str, Any] = {"step": row["step"], "split": row["split"]}
    for name, value in row.items():
        if name not in ("step", "split"):
            number = float(f"{value:.7g}")
            out[name] = number if math.isfinite(number) else None
    return json.dumps(out | {"crc32": _crc(out)}, allow_nan=False) + "\n"


def _crc(row: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def read_lines(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a `metrics.jsonl`, and the numbers, from 1, of the lines that are damaged.

    A last line that a kill cut off is neither. Rows without a checksum count if no row has one.
    """
    path = epath.Path(path)
    content = path.read_bytes() if path.is_file() else b""
    lines, checked = content.splitlines(keepends=True), b'"crc32": ' in content
    rows, damaged = list[dict[str, Any]](), list[int]()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            crc = row.pop("crc32", None)
            if crc != _crc(row) and (crc or checked):
                raise ValueError("it is not the line that was written")
            place = {"step": int(row.pop("step")), "split": row.pop("split")}
            rows.append(place | {k: math.nan if x is None else float(x) for k, x in row.items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if b"}" in line or b"\n" in line:
                damaged.append(number)
    if damaged:
        logging.warning("%s: line %s is damaged and left out", path, ", ".join(map(str, damaged)))
    return rows, damaged


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without damaged lines."""
    return read_lines(path)[0]


def check_best(train: TrainConfig, steps: int, dpo: DpoConfig | None) -> None:
    """Refuses a `train.keep_best` that a run of `steps` steps (0: none held out) won't measure."""
    wanted, _ = train.best_and_patience
    if not wanted:
        return
    if not steps:
        raise ValueError(f"train.keep_best={wanted} needs a held-out split; name it in data.splits")
    if not 0 < train.eval_every < steps:
        raise ValueError(
            f"train.keep_best={wanted} needs train.eval_every (now {train.eval_every}) between 0 "
            f"and the run's {steps} steps"
        )
    direction, _, name = wanted.rpartition(":")
    choose("train.keep_best", direction, ("", "min", "max"))
    of_pairs = LABEL_METRICS if dpo and dpo.labeled else PAIR_METRICS
    measured = of_pairs if dpo else ("loss",)
    choose("train.keep_best", name.removeprefix("eval_"), measured)


class BestStep:
    """The saved step above 0 with the best held-out value so far, which `best.json` holds too."""

    def __init__(
        self,
        workdir: epath.Path,
        train: TrainConfig,
        rows: Sequence[dict[str, Any]] = (),
        saved: Sequence[int] = (),
    ):
        wanted, self._patience = train.best_and_patience
        direction, _, name = wanted.rpartition(":")
        self._path = workdir / "best.json"
        self._name = f"eval_{name.removeprefix('eval_')}"
        low = direction == "min" or (not direction and ("loss" in name or name.endswith("kl")))
        self._sign = -1.0 if low else 1.0
        self.step, self.since, self._value = 0, 0, -math.inf  # since: evaluations after it
        if not wanted:
            return
        for row in rows:
            if row["split"] == "eval":
                self._count(row["step"], row, row["step"] in saved)
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
        better = self._count(step, means)
        if better:
            self._write()
        return better

    def _count(self, step: int, means: Mapping[str, Any], saved: bool = True) -> bool:
        if self._name not in means or not step:
            return False
        # Rounded as a resumed run reads it
        value = self._sign * float(np.float32(f"{means[self._name]:.7g}"))
        better = saved and value > self._value
        if better:
            self.step, self.since, self._value = step, 0, value
        else:
            self.since += 1
        return better

    def _write(self) -> None:
        if jax.process_index():
            return
        if self.step:
            best = {"step": self.step, "metric": self._name, "value": self._sign * self._value}
            write_checked(self._path, best)
        else:
            self._path.unlink(missing_ok=True)


def learned(rows: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """What a run learned by its metrics in a few words, and whether its loss fell.

    By held-out values, or those in training without any; of an accuracy a tie counts one half.
    """
    for split, words, prefix in (("eval", "held-out", "eval_"), ("train", "training", "")):
        lines = [row for row in rows if row["split"] == split]
        if len(lines) < 2:
            continue
        ends = lines[0], lines[-1]
        before, after = (line[f"{prefix}loss"] for line in ends)
        text = f"{words} loss {before:.4f} -> {after:.4f}"
        name, ties = f"{prefix}rewards/accuracies", f"{prefix}rewards/ties"
        if name in lines[0]:
            first, last = (line[name] + line.get(ties, 0) / 2 for line in ends)
            text += f", accuracy {first:.2f} -> {last:.2f}"
        return text, after < before
    return "too few lines of metrics to say what was learned", True


class Tracker(NamedTuple):
    """Where lines go besides: `log` takes a step and its values by name, `close` waits for all."""

    log: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]


def check_trackers(names: Sequence[str], workdir: epath.Path) -> None:
    """Raises a ModuleNotFoundError or a ValueError if a tracker of the run cannot be opened."""
    missing = [_PACKAGES[name] for name in names if find_spec(_PACKAGES[name]) is None]
    if missing:
        raise ModuleNotFoundError(
            f"train.trackers={names} needs {', '.join(missing)}: pip install 'zephyr_jax[trackers]'"
        )
    if "tensorboard" in names and is_remote(workdir):
        raise ValueError(f"train.trackers: tensorboard needs a disk, not {workdir}; leave it out")


def open_trackers(config: RunConfig, workdir: epath.Path) -> list[Tracker]:
    """The trackers of a run, which go on where an earlier start ended; none but on process 0."""
    if jax.process_index() or not config.train.trackers:
        return []
    path = workdir / "trackers.json"  # the id by which trackers know the run
    if not path.is_file():
        write_checked(path, {"id": uuid.uuid4().hex[:8]})
    run_id = read_checked(path, "remove it", ["id"])["id"]
    return [_opened(name, config.to_dict(), workdir, run_id) for name in config.train.trackers]


def _opened(name: str, config: dict[str, Any], workdir: epath.Path, run_id: str) -> Tracker:
    module: Any = import_module(_PACKAGES[name])
    if name == "tensorboard":
        folder, own = workdir / "tensorboard", f".{uuid.uuid4().hex[:8]}"  # a file for each start
        is_new = not folder.is_dir()
        writer = module.SummaryWriter(str(folder), filename_suffix=own)
        if is_new:
            writer.add_text("config", f"    {json.dumps(config, indent=1)}", 0)

        def log(step: int, values: Mapping[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Tracker(log, writer.close)
    options: dict[str, Any] = {"project": "zephyr_jax", "config": config, "resume": "allow"}
    if name == "trackio":
        off = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
        session = module.init(name=f"{config['name']}-{run_id}", **options, **off)
        return Tracker(lambda step, values: session.log(dict(values), step=step), module.finish)
    options |= {"dir": None if is_remote(workdir) else str(workdir), "id": run_id}
    try:
        options["settings"] = module.Settings(console="off")
        session = module.init(name=config["name"], **options)
    except module.Error as error:
        remedy = "log in with `wandb login`, or set WANDB_MODE=offline"
        raise ValueError(f"train.trackers=wandb: {error}; {remedy}") from error
    session.define_metric("step")
    session.define_metric("*", step_metric="step")  # a step has several lines
    return Tracker(lambda step, values: session.log({"step": step, **values}), session.finish)
