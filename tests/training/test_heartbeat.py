"""Signs of life, and traces, of a run."""

import dataclasses
import json
import logging as standard_logging

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from runs import ONE, TIMED, config_of, mesh_of

import zephyr_jax as zj
from zephyr_jax.training.metrics import TRACED, Heartbeat, Profiler, read_metrics


def test_a_heart_beats_now_and_then(tmp_path):
    at = [0.0]
    heart = Heartbeat(epath.Path(tmp_path), 100, now=lambda: at[0])

    def said():
        return json.loads((tmp_path / "heartbeat.json").read_text())

    heart.beat(10)
    assert said()["step"] == 10
    for seconds, step, seen in ((20, 14, 10), (30, 16, 16), (59, 20, 16), (60, 22, 22)):
        at[0] = seconds
        heart.beat(step)
        assert said()["step"] == seen
    assert said()["doing"] == "train"
    heart.beat(22, "eval")
    assert said()["doing"] == "train"
    heart.beat(23, "stopped")
    assert (said()["step"], said()["doing"], said()["total_steps"]) == (23, "stopped", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_a_trace_beyond_the_run_is_refused(tmp_path):
    Profiler((10, 13), 12, epath.Path(tmp_path))
    with pytest.raises(ValueError, match="goes beyond the run's 11 steps"):
        Profiler((10, 13), 11, epath.Path(tmp_path))


def steps_in(folder):
    """The files of a trace, and the bytes in them."""
    files = list(folder.rglob("*.xplane.pb"))
    return files, b"".join(path.read_bytes() for path in files)


def test_only_the_steps_of_the_span_are_traced(tmp_path):
    profiler = Profiler((3, 5), 9, epath.Path(tmp_path))
    square = jax.jit(lambda x: x @ x)
    for step in range(1, 10):
        with profiler.around(step), jax.profiler.TraceAnnotation(f"inside_{step}"):
            out = square(jnp.ones((64, 64)))
        profiler.after(step, out, last=step == 9)
    files, content = steps_in(tmp_path / "profile")
    assert len(files) == 1
    assert TRACED.encode() in content
    assert [step for step in range(1, 10) if f"inside_{step}".encode() in content] == [3, 4]


@pytest.mark.slow
def test_a_run_leaves_a_trace_a_heartbeat_and_goodput(world, tmp_path, caplog):
    config = config_of(world, "sft", max_steps=4, log_every=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, profile=(2, 4)))
    with mesh_of(ONE), caplog.at_level(standard_logging.INFO):
        zj.fit(config, tmp_path / "run")
    files, content = steps_in(tmp_path / "run" / "profile")
    assert len(files) == 1
    assert TRACED.encode() in content
    assert "steps 2 to 3 are traced in" in caplog.text
    said = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert (said["step"], said["total_steps"], said["doing"]) == (4, 4, "done")
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "goodput" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["goodput"] == 0 < rows[-1]["goodput"] < 1
    walls = [row["wall_s"] for row in rows]
    assert walls == sorted(walls)
    assert all(row["productive_s"] < row["wall_s"] for row in rows)
    assert rows[-1].keys() > TIMED - {"pairs_per_s"}
