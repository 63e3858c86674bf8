"""A run stopped on four processes goes on on two, then on one, as if nothing had happened.

That each of them reads the same rows of the same batches is in tests/data/test_batches.py.
"""

import dataclasses
import json
import time

import pytest
import restored_digests
from processes import start_processes, wait_for
from test_curves import STEPS, assert_same, curves_of, twenty_steps
from test_distributed import train

from zephyr_jax.config.run import MeshConfig
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.setup import pack

pytestmark = pytest.mark.slow
DEVICES = 8


def steps_made(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return max([row["step"] for row in rows if row["split"] == "train"], default=0)


def stopped(config, workdir, processes, logs, after):
    """Runs until `after` more steps are made, sends SIGTERM to the last process; the step saved."""
    begun = steps_made(workdir)
    started = train(config, workdir, processes, DEVICES // processes, logs)
    end = time.monotonic() + 400
    while steps_made(workdir) < begun + after and time.monotonic() < end:
        time.sleep(0.02)
    started[-1].terminate()
    assert wait_for(started, logs, 400) == [75] * processes
    return json.loads((workdir / "heartbeat.json").read_text())["step"]


def restored(workdir, processes, logs):
    """What every process says of the newest checkpoint: one line, the same for all."""
    words = [restored_digests.__file__, str(workdir)]
    started = start_processes(words, processes, DEVICES // processes, logs)
    assert wait_for(started, logs) == [0] * processes
    said = [
        line
        for i in range(processes)
        for line in (logs / f"{i}.log").read_text().splitlines()
        if line.startswith("digests")
    ]
    assert len(said) == processes
    assert len(set(said)) == 1
    return said[0].split()[1:]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_four_processes_then_two_then_one(world, tmp_path, kind):
    config = twenty_steps(world, kind, MeshConfig(2, 2, 2))
    # no evaluation: an undisturbed run has those of its stops at other steps
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=0))
    pack(config, 4)
    whole, cut, logs = tmp_path / "whole", tmp_path / "cut", tmp_path / "logs"
    started = train(config, whole, 1, DEVICES, tmp_path / "logs_whole")
    assert wait_for(started, tmp_path / "logs_whole", 400) == [0]
    first = stopped(config, cut, 4, logs / "four", 3)
    said = {n: restored(cut, n, logs / f"restored{n}") for n in (4, 2, 1)}
    assert said[4] == said[2] == said[1]
    assert said[1][0] == str(first)
    second = stopped(config, cut, 2, logs / "two", 3)
    assert 3 <= first < second < STEPS
    started = train(config, cut, 1, DEVICES, logs / "one")
    assert wait_for(started, logs / "one", 400) == [0]
    assert_same(curves_of(cut), curves_of(whole))
    rows = [row for row in read_metrics(cut / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    walls = [row["wall_s"] for row in rows]
    assert walls == sorted(walls)
