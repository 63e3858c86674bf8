"""The curves of 20 steps: one device, eight in several meshes, several processes, two stops.

That each process reads the same rows of the same batches is in tests/data/test_batches.py.
"""

import json
import time

import numpy as np
import pytest
from conftest import with_fields
from processes import wait_for
from runs import ONE, TIMED, config_of, mesh_of, metrics_of
from test_distributed import train

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.training.loop import fit
from zephyr_jax.training.setup import pack

STEPS, BOUND = 20, 1e-5  # of a curve's largest value
COUNTS = ("rewards/accuracies", "rewards/ties")
KINDS = ("sft", "dpo")
MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4), (8, 1, 1)]
DEVICES = 8
pytestmark = pytest.mark.slow  # tests/training/test_loop.py has ten steps on one device


def twenty_steps(world, kind, mesh=ONE, eval_every=10):
    """A run whose heads four devices can share."""
    train = {"max_steps": STEPS, "epochs": 20, "checkpoint_every": 0, "eval_every": eval_every}
    config = config_of(world, kind, **train, micro_batches=2 if kind == "dpo" else 1)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return with_fields(config, model=heads, optim={"peak_lr": 1e-3}, mesh=mesh)


def curves_of(workdir):
    """(split, name) -> the values of a curve."""
    curves = {}
    for row in metrics_of(workdir):
        for name in row.keys() - TIMED - {"split", "step"}:
            curves.setdefault((row["split"], name), []).append(row[name])
    return curves


def assert_same(curves, expected):
    assert curves.keys() == expected.keys()
    assert len(curves["train", "loss"]) == STEPS
    for name, values in expected.items():
        # Where the policy still is the reference, rounding decides on which side of 0 a margin is.
        first = {"train": 2, "eval": 1}[name[0]] if name[1].endswith(COUNTS) else 0
        most = BOUND * np.abs(values).max()
        if name[1] == "eval_kl":  # the mean of two drifts that nearly cancel: as exact as they are
            drifts = [expected["eval", f"eval_drift/{x}"] for x in ("chosen", "rejected")]
            most = BOUND * np.abs(drifts).max()
        if name[1].endswith("rewards/margins"):  # beta times four sums, each to its last bit
            sums = np.abs(expected["eval", "eval_logps/chosen"]).max()
            most = max(most, 0.1 * 4 * np.spacing(np.float32(sums)))
        np.testing.assert_allclose(
            curves[name][first:], values[first:], rtol=0, atol=most, err_msg=str(name)
        )


@pytest.fixture(scope="module")
def on_one_device(world, tmp_path_factory):
    """Curves by kind."""
    curves = {}
    for kind in KINDS:
        workdir = tmp_path_factory.mktemp(kind)
        with mesh_of(ONE):
            fit(twenty_steps(world, kind), workdir)
        curves[kind] = curves_of(workdir)
        first, last = (curves[kind]["train", "loss"][at] for at in (0, -1))
        assert last < 0.95 * first  # something is learned
    return curves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_eight_devices_give_the_curves_of_one(world, tmp_path, on_one_device, sizes, kind):
    mesh = MeshConfig(*sizes)
    with mesh_of(mesh):
        fit(twenty_steps(world, kind, mesh), tmp_path)
    assert_same(curves_of(tmp_path), on_one_device[kind])


def steps_done(workdir):
    return max([row["step"] for row in metrics_of(workdir, "train")], default=0)


def stopped(config, workdir, processes, logs, after):
    """Runs until `after` more steps are done, sends SIGTERM to the last process; the step saved."""
    before = steps_done(workdir)
    started = train(config, workdir, processes, DEVICES // processes, logs)
    end = time.monotonic() + 400
    while steps_done(workdir) < before + after and time.monotonic() < end:
        time.sleep(0.02)
    started[-1].terminate()
    assert wait_for(started, logs, 400) == [75] * processes
    texts = [(logs / f"{i}.log").read_text() for i in range(processes)]
    assert ["stopped at step" in text for text in texts] == [True] + [False] * (processes - 1)
    status = json.loads((workdir / "heartbeat.json").read_text())
    assert status["doing"] == "stopped"
    assert (workdir / "checkpoints" / str(status["step"]) / "digests.json").is_file()
    return status["step"]


@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_then_two_then_one_are_an_undisturbed_run(world, tmp_path, kind):
    # no evaluation: an undisturbed run has those of its stops at other steps
    config = twenty_steps(world, kind, MeshConfig(2, 2, 2), eval_every=0)
    pack(config)
    whole, cut, logs = tmp_path / "whole", tmp_path / "cut", tmp_path / "logs"
    started = train(config, whole, 1, DEVICES, tmp_path / "logs_whole")
    assert wait_for(started, tmp_path / "logs_whole", 400) == [0]
    first = stopped(config, cut, 4, logs / "four", 3)
    second = stopped(config, cut, 2, logs / "two", 3)
    assert 3 <= first < second < STEPS
    started = train(config, cut, 1, DEVICES, logs / "one")
    assert wait_for(started, logs / "one", 400) == [0]
    assert_same(curves_of(cut), curves_of(whole))
    rows = metrics_of(cut, "train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    walls = [row["wall_s"] for row in rows]
    assert walls == sorted(walls)
    assert RunConfig.from_config_dict(json.loads((cut / "run_config.json").read_text())) == config
