"""The curves of 20 steps: one device, eight in several meshes, two and four processes."""

import dataclasses

import numpy as np
import pytest
from processes import start_processes, wait_for
from runs import ONE, TIMED, config_of, mesh_of
from test_distributed import config_file

import zephyr_jax as zj
from zephyr_jax.config.run import MeshConfig
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.setup import pack

STEPS, BOUND = 20, 1e-5  # of a curve's largest value
COUNTS = ("rewards/accuracies", "rewards/ties")
KINDS = ("sft", "dpo")
MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4), (8, 1, 1)]
pytestmark = pytest.mark.slow  # tests/training/runs.py has ten steps on eight devices


def twenty_steps(world, kind, mesh=ONE):
    """A run whose heads four devices can share."""
    config = config_of(
        world,
        kind,
        max_steps=STEPS,
        epochs=20,
        log_every=1,
        checkpoint_every=0,
        eval_every=10,
        micro_batches=2 if kind == "dpo" else 1,
    )
    model = dataclasses.replace(config.model, num_attention_heads=8, num_key_value_heads=4)
    optim = dataclasses.replace(config.optim, peak_lr=1e-3)
    return dataclasses.replace(config, model=model, optim=optim, mesh=mesh)


def curves_of(workdir):
    """(split, name) -> the values of a curve."""
    curves = {}
    for row in read_metrics(workdir / "metrics.jsonl"):
        for name in row.keys() - TIMED - {"split", "step"}:
            curves.setdefault((row["split"], name), []).append(row[name])
    return curves


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert len(found["train", "loss"]) == STEPS
    for name, values in expected.items():
        # Where the policy still is the reference, rounding decides on which side of 0 a margin is.
        first = {"train": 2, "eval": 1}[name[0]] if name[1].endswith(COUNTS) else 0
        most = BOUND * np.abs(values).max()
        np.testing.assert_allclose(
            found[name][first:], values[first:], rtol=0, atol=most, err_msg=str(name)
        )


@pytest.fixture(scope="module")
def on_one_device(world, tmp_path_factory):
    """Curves by kind."""
    found = {}
    for kind in KINDS:
        workdir = tmp_path_factory.mktemp(kind)
        with mesh_of(ONE):
            zj.fit(twenty_steps(world, kind), workdir)
        found[kind] = curves_of(workdir)
        first, last = (found[kind]["train", "loss"][at] for at in (0, -1))
        assert last < 0.95 * first  # something is learned
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_eight_devices_give_the_curves_of_one(world, tmp_path, on_one_device, sizes, kind):
    mesh = MeshConfig(*sizes)
    with mesh_of(mesh):
        zj.fit(twenty_steps(world, kind, mesh), tmp_path)
    assert_same(curves_of(tmp_path), on_one_device[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_curves_of_one_device(world, tmp_path, on_one_device, processes, kind):
    config = twenty_steps(world, kind, MeshConfig(2, 2, 2))
    pack(config, 4)
    path, logs, workdir = tmp_path / "config.py", tmp_path / "logs", tmp_path / "run"
    words = ["-m", "zephyr_jax", "train", f"--config={config_file(path, config)}"]
    started = start_processes([*words, f"--workdir={workdir}"], processes, 8 // processes, logs)
    assert wait_for(started, logs) == [0] * processes
    assert_same(curves_of(workdir), on_one_device[kind])
