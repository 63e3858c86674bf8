"""Two processes: the same run as one, a stop that all agree on, and errors that say what to do."""

import argparse
import dataclasses
import json
import time

import numpy as np
import pytest
from processes import start_processes, wait_for
from runs import TIMED, config_of

from zephyr_jax import distributed
from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.setup import pack


def config_file(path, config):
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return path


def train(config, workdir, n, devices, logs):
    path = config_file(workdir.with_suffix(".py"), config)
    words = ["-m", "zephyr_jax", "train", f"--config={path}", f"--workdir={workdir}"]
    return start_processes(words, n, devices, logs)


@pytest.fixture(scope="module")
def meshed(world):
    """A DPO run for 4 devices, packed; its references are computed by all processes."""
    config = config_of(world, "dpo", max_steps=6, checkpoint_every=3, log_every=1, micro_batches=1)
    config = dataclasses.replace(config, mesh=MeshConfig(1, 2, 2))
    pack(config, 2)
    return config


@pytest.mark.slow
def test_two_processes_train_as_one(meshed, tmp_path):
    for n in (1, 2):
        logs = tmp_path / f"logs{n}"
        started = train(meshed, tmp_path / f"run{n}", n, 4 // n, logs)
        assert wait_for(started, logs) == [0] * n
    one, two = (read_metrics(tmp_path / f"run{n}" / "metrics.jsonl") for n in (1, 2))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMED - {"split"}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step_and_the_run_goes_on(meshed, tmp_path):
    long = dataclasses.replace(meshed, train=dataclasses.replace(meshed.train, max_steps=0))
    logs, workdir = tmp_path / "logs", tmp_path / "run"
    started = train(long, workdir, 2, 2, logs)
    metrics = workdir / "metrics.jsonl"
    end = time.monotonic() + 200
    while len(read_metrics(metrics)) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    started[1].terminate()
    assert wait_for(started, logs) == [75, 75]
    said = [(logs / f"{i}.log").read_text() for i in (0, 1)]
    assert "going on" not in said[1]  # process 0 says what all would
    assert "stopped at" not in said[1]
    step = int(said[0].split("stopped at step ")[1].split(" ")[0])
    assert json.loads((workdir / "heartbeat.json").read_text())["doing"] == "stopped"
    assert (workdir / "checkpoints" / f"{step}.sums.json").is_file()
    started = train(long, workdir, 1, 4, logs)  # one process goes on
    assert wait_for(started, logs) == [0]
    steps = [row["step"] for row in read_metrics(metrics) if row["split"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] > step
    saved = json.loads((workdir / "run_config.json").read_text())
    assert RunConfig.from_config_dict(saved) == long


def arguments(*words):
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    return parser.parse_args(words)


def test_incomplete_processes_are_named(monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"do not come together: .*; name them by --coordinator"):
        distributed.start(arguments("--num_processes=2"))
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(SystemExit):
        arguments()
    assert "--process_id: invalid int value: 'one'" in capsys.readouterr().err


def test_without_flags_there_is_one_process():
    distributed.start(arguments())
    distributed.check_started()
