"""Experiment trackers in addition to `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

A resumed training run goes on in the same run of the tracker.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from etils import epath

from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.storage import is_remote, read_json, write_atomic

FILE = "trackers.json"  # in the workdir: the id by which trackers know the run
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "zephyr_jax"


class Tracker(NamedTuple):
    """Where lines go: `log` takes step, split and values of one, `close` waits for all."""

    log: Callable[[int, str, Mapping[str, float]], None]
    close: Callable[[], None]


def check_trackers(names: Sequence[str], workdir: epath.Path) -> None:
    """Raises a ModuleNotFoundError or a ValueError if a tracker of the run cannot be opened."""
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise ModuleNotFoundError(
                f"train.trackers={names} needs {_PACKAGES[name]}, which is not "
                f'installed: pip install "zephyr_jax[trackers]"'
            )
        if name == "tensorboard" and is_remote(workdir):
            raise ValueError(
                f"train.trackers: tensorboard writes to a disk, not to {workdir}; leave it out"
            )


def open_trackers(
    names: Sequence[str], config: dict[str, Any], workdir: epath.Path, step: int
) -> list[Tracker]:
    """The trackers of a run that goes on from `step`; none but on process 0.

    Call it before `metrics.jsonl` loses the lines that are about to be repeated: no tracker gets
    a line twice.
    """
    if jax.process_index() or not names:
        return []
    path = workdir / FILE
    if not path.is_file():
        write_atomic(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    run_id = read_json(path, "remove it", ["id"])["id"]
    rows = read_metrics(workdir / "metrics.jsonl")
    sent = {(row["step"], row["split"]) for row in rows}
    return [_opened(_OPEN[name](config, run_id, workdir, step), name, sent) for name in names]


def _opened(tracker: Tracker, name: str, sent: set[tuple[int, str]]) -> Tracker:
    """The tracker under names such as train/loss, without the lines that it has."""

    def log(step: int, split: str, values: Mapping[str, float]) -> None:
        if name == "tensorboard" or (step, split) not in sent:
            named = {f"{split}/{key.removeprefix('eval_')}": x for key, x in values.items()}
            tracker.log(step, split, named)

    return Tracker(log, tracker.close)


def _tensorboard(config: dict[str, Any], _: str, workdir: epath.Path, step: int) -> Tracker:
    """Event files in WORKDIR/tensorboard; of repeated steps a reader drops the older points."""
    from tensorboardX import SummaryWriter

    folder = workdir / "tensorboard"
    purged = step + 1 if folder.is_dir() else None
    writer = SummaryWriter(str(folder), purge_step=purged, filename_suffix=f".from{step}")
    if purged is None:
        writer.add_text("config", f"    {json.dumps(config, indent=1)}", 0)

    def log(step: int, _: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(config: dict[str, Any], run_id: str, workdir: epath.Path, _: int) -> Tracker:
    """A run of the project zephyr_jax, resumed by its id; WANDB_MODE=offline stays on this disk."""
    wandb: Any = import_module("wandb")
    folder = None if is_remote(workdir) else str(workdir)
    names = {"project": _PROJECT, "id": run_id, "name": config["name"], "resume": "allow"}
    settings = wandb.Settings(console="off")
    try:
        session = wandb.init(**names, config=config, dir=folder, settings=settings)
    except wandb.Error as error:
        raise ValueError(
            f"train.trackers=wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    session.define_metric("step")
    session.define_metric("*", step_metric="step")  # W&B's own counter knows no repeated steps
    return Tracker(lambda step, _, values: session.log({"step": step, **values}), session.finish)


def _trackio(config: dict[str, Any], run_id: str, _: epath.Path, __: int) -> Tracker:
    """A run of the project zephyr_jax in trackio's own folder, named by name and id."""
    trackio: Any = import_module("trackio")
    names = {"project": _PROJECT, "name": f"{config['name']}-{run_id}", "resume": "allow"}
    off = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
    session = trackio.init(**names, config=config, **off)
    return Tracker(lambda step, _, values: session.log(dict(values), step=step), trackio.finish)


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
