"""Small training runs: the demo's recipes with a tiny model, killed where a test says."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from conftest import device_mesh, with_fields

import zephyr_jax as zj
from zephyr_jax.config.run import MeshConfig, RunConfig, load_config
from zephyr_jax.evaluation.metrics_file import read_metrics
from zephyr_jax.training.loop import fit
from zephyr_jax.types import TrainState

# The metrics in which two runs that compute the same differ
TIMED = frozenset({"target_tokens_per_s", "tokens_per_s", "pairs_per_s", "elapsed_s", "eta_s"})
TIMED |= {"goodput", "wall_s", "productive_s", "time/data_wait", "time/step", "time/save"}
TIMED |= {f"time/{part}" for part in ("start", "checks", "data", "init", "restore")}
TIMED |= {f"time/{part}" for part in ("compile", "first_step", "held_out")}
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)


class Finished(NamedTuple):
    """A run that is done, to be read, or copied before it is changed."""

    config: RunConfig
    workdir: Path
    state: TrainState

    def copied(self, workdir: Path) -> Path:
        """A copy of its folder."""
        return Path(shutil.copytree(self.workdir, workdir))


def finished(config: RunConfig, workdir: Path) -> Finished:
    """The run on one device."""
    with mesh_of(ONE):
        return Finished(config, workdir, fit(config, workdir))


def config_of(world, kind, **train):
    """The demo's recipe with a tiny model: 10 steps, micro-batches, a checkpoint at 5."""
    config = load_config(f"demo_{kind}")
    model = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400)
    train = {
        "epochs": 4, "max_steps": 10, "batch_size": 8, "micro_batches": 2, "eval_every": 0,
        "checkpoint_every": 5, "keep_checkpoints": 2, "log_every": 1,
    } | train  # fmt: skip
    data = {"data_dir": str(world / "data"), "tokenizer": str(world / "tokenizer")}
    return with_fields(config, model=model, init="", data=data, mesh=ONE, train=train)


def metrics_of(workdir, split=""):
    """The lines of a run's metrics.jsonl, or those of one split."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == split or not split]


def mesh_of(config: MeshConfig):
    """A mesh over the first devices, set around `fit` as a notebook would."""
    return jax.set_mesh(device_mesh(config.data, config.fsdp, config.tensor))


class Killed(Exception):
    """What a test raises in the middle of a run."""


def kill_at(monkeypatch, step):
    """Lets `fit` die when it writes the metrics of a step."""
    from zephyr_jax.training import loop

    write = loop.MetricsFile.write

    def dying(self, at, split, values):
        write(self, at, split, values)
        if at == step and split == "train":
            raise Killed

    monkeypatch.setattr(loop.MetricsFile, "write", dying)


def killed_and_resumed(monkeypatch, config, workdir, step=8, events=None):
    """The last state of a run that was killed at a step and started again, with its events."""
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with contextlib.suppress(Killed):
            fit(config, workdir)
            raise AssertionError("the run was not killed")
    if events is not None:
        events.clear()
    return fit(config, workdir)


def flip_a_bit(folder):
    """In the middle of the folder's largest file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_equal(a, b):
    """Every array of two trees is the same to the bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))
