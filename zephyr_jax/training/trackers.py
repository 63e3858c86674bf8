"""Experiment trackers in addition to `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

Each is a function that opens a run there. A resumed training run goes on in the same one.
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

from zephyr_jax.config.run import RunConfig
from zephyr_jax.storage import is_remote, write_atomic
from zephyr_jax.training.metrics import read_metrics

FILE = "trackers.json"  # in the workdir: the run's id, and which trackers know it
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "zephyr_jax"


class Tracker(NamedTuple):
    """Where lines go: `log` takes step, split and values of one, `close` waits for all."""

    log: Callable[[int, str, Mapping[str, float]], None]
    close: Callable[[], None]


class RunInfo(NamedTuple):
    """What a tracker reads of the run that it opens."""

    name: str
    id: str  # its own; two runs of one name differ in it
    workdir: epath.Path
    config: dict[str, Any]
    step: int  # that the run goes on from
    sent: frozenset[tuple[int, str]]  # lines that it was sent by an earlier start


def check_trackers(names: Sequence[str], workdir: epath.Path) -> None:
    """Whether every tracker that the run wants can be opened.

    Raises:
        ModuleNotFoundError: if a package is not installed.
        ValueError: if TensorBoard's files would go into a bucket.
    """
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


def open_trackers(config: RunConfig, workdir: epath.Path, step: int) -> list[Tracker]:
    """The run's trackers; none but on process 0.

    Call it before `metrics.jsonl` loses the lines that are about to be repeated: no tracker gets
    a line twice.

    Args:
        config: of the run.
        workdir: of the run.
        step: that the run goes on from.
    """
    names = config.train.trackers
    if jax.process_index() or not names:
        return []
    path = workdir / FILE
    stored = json.loads(path.read_text()) if path.is_file() else {"id": uuid.uuid4().hex[:8]}
    known = stored.get("trackers", [])
    lines = frozenset(
        (row["step"], row["split"]) for row in read_metrics(workdir / "metrics.jsonl")
    )
    own, opened = stored["id"], []
    for name in names:
        sent = lines if name in known else frozenset[tuple[int, str]]()
        info = RunInfo(config.name, own, workdir, config.to_dict(), step, sent)
        opened.append(_OPEN[name](info))
    write_atomic(path, json.dumps({"id": own, "trackers": sorted({*known, *names})}) + "\n")
    return opened


def _flat_names(split: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name.removeprefix('eval_')}": value for name, value in values.items()}


def _tensorboard(run: RunInfo) -> Tracker:
    """Event files in WORKDIR/tensorboard; of repeated steps a reader drops the older points."""
    from tensorboardX import SummaryWriter

    folder = str(run.workdir / "tensorboard")
    purged = run.step + 1 if run.sent else None
    writer = SummaryWriter(folder, purge_step=purged, filename_suffix=f".from{run.step}")
    if not run.sent:
        writer.add_text("config", f"    {json.dumps(run.config, indent=1)}", 0)

    def log(step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in _flat_names(split, values).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(run: RunInfo) -> Tracker:
    """A run of the project zephyr_jax, resumed by its id; WANDB_MODE=offline stays on this disk."""
    wandb: Any = import_module("wandb")

    try:
        session = wandb.init(
            project=_PROJECT,
            id=run.id,
            name=run.name,
            config=run.config,
            dir=None if is_remote(run.workdir) else str(run.workdir),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ValueError(
            f"train.trackers=wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    session.define_metric("step")
    session.define_metric("*", step_metric="step")  # W&B's own counter knows no repeated steps

    def log(step: int, split: str, values: Mapping[str, float]) -> None:
        if (step, split) not in run.sent:
            session.log({"step": step} | _flat_names(split, values))

    return Tracker(log, session.finish)


def _trackio(run: RunInfo) -> Tracker:
    """A run of the project zephyr_jax in trackio's own folder, named by name and id."""
    trackio: Any = import_module("trackio")

    session = trackio.init(
        project=_PROJECT,
        name=f"{run.name}-{run.id}",
        config=run.config,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )

    def log(step: int, split: str, values: Mapping[str, float]) -> None:
        if (step, split) not in run.sent:
            session.log(_flat_names(split, values), step=step)

    return Tracker(log, trackio.finish)


_OPEN: dict[str, Callable[[RunInfo], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
