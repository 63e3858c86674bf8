"""What a run measures of itself: means, goodput, metrics.jsonl, heartbeat and traces."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from zephyr_jax.distributed import TRACED, Heartbeat, Profiler
from zephyr_jax.evaluation.metrics_file import MetricsFile, read_lines, read_metrics
from zephyr_jax.training.metrics import Clock, Meter


@pytest.mark.parametrize("size", [1, 3, 8])
def test_means_depend_on_the_examples_alone_however_they_are_cut(size):  # pitfall 22
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 50, 10).astype(float)
    losses = rng.uniform(0, 9, 10)
    meter = Meter()
    for start in range(0, 16, size):  # the last parts lack examples, as padded batches do
        here = slice(start, start + size)
        weight = targets[here].sum()
        meter.add({"loss": losses[here] @ targets[here], "weight": weight, "tokens": 2 * weight})
    means = meter.means()
    assert list(means) == ["loss"]
    np.testing.assert_allclose(means["loss"], losses @ targets / targets.sum(), rtol=1e-12)
    assert meter.steps == -(-16 // size)
    assert meter.total("tokens") == 2 * targets.sum()


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def steps_of(clock, hands, n, wait, work):
    meter = Meter()
    for _ in range(n):
        hands.at += wait
        clock.end("data_wait")
        hands.at += work
        meter.add({"tokens": 20, "target_tokens": 10, "weight": 10})
        clock.end("step")
    return meter


def test_goodput_is_the_share_of_time_inside_steps():
    hands = Hands()
    clock = Clock(began=70.0, now=hands)
    # The run's earlier starts took 1,000 s.
    clock.total_steps, clock.before, clock.step_at_peak = 100, (1000.0, 600.0), 0.5
    clock.end("restore")
    hands.at += 10
    clock.end_first_step({})
    first = clock.read(Meter(), 1, pairs=False)
    assert (first["goodput"], first["wall_s"]) == (0, 1040)
    assert str(clock) == "restore 30 s, compile 10 s, first step 0 s"
    rates = clock.read(steps_of(clock, hands, 4, wait=1, work=4), 5, pairs=True)
    assert (rates["productive_s"], rates["wall_s"]) == (616, 1060)
    assert rates["goodput"] == pytest.approx(16 / 60)
    assert rates["target_tokens_per_s"] == rates["pairs_per_s"] == pytest.approx(40 / 20)
    assert rates["mfu"] == pytest.approx(4 * 0.5 / 20)
    hands.at += 40
    clock.end("held_out")
    rates = clock.read(steps_of(clock, hands, 5, 0, 4), 10, pairs=False)
    assert (rates["productive_s"], rates["wall_s"]) == (636, 1120)
    assert rates["goodput"] == pytest.approx(0.3)
    assert rates["target_tokens_per_s"] == pytest.approx(50 / 20)
    assert (rates["time/held_out"], rates["time/data_wait"], rates["time/step"]) == (40, 4, 36)
    assert sum(x for name, x in rates.items() if name.startswith("time/")) == rates["elapsed_s"]


def test_steps_that_are_repeated_were_not_productive(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    assert MetricsFile(path, 0).before == (0, 0)
    metrics = MetricsFile(path, 0)
    for step in (5, 10, 15):
        metrics.write(step, "train", {"wall_s": 10.0 * step, "productive_s": 6.0 * step})
    assert MetricsFile(path, 10).before == (150, 60)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.fixture
def metrics(tmp_path):
    """A metrics.jsonl of six lines."""
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(step, "train", {"loss": 0.1 * step, "rewards/chosen": -1e-9 / step})
    file.write(5, "eval", {"eval_loss": math.nan, "eval_kl": -math.inf, "eval_source/a/pairs": 7})
    return path


def test_metrics_are_json_also_where_a_number_is_not_finite(metrics):
    def refuse(word):
        raise AssertionError(word)

    lines = metrics.read_text().splitlines()
    last = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert (last["eval_loss"], last["eval_kl"], last["eval_source/a/pairs"]) == (None, None, 7)
    assert math.isnan(read_metrics(metrics)[-1]["eval_loss"])


def test_a_damaged_byte_is_noticed_and_costs_its_own_line_alone(metrics, caplog):
    whole, lines = metrics.read_bytes(), list(map(str, read_metrics(metrics)))
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, len(whole), 150), len(whole) - 1]:
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.integers(8)
        metrics.write_bytes(broken)
        rows, damaged = read_lines(metrics)
        assert 1 <= len(damaged) <= 2  # a newline is between two lines
        assert len(rows) >= 4
        assert set(map(str, rows)) < set(lines)
    for copies in (1, 2):
        metrics.write_bytes(broken)
        MetricsFile(metrics, 5)
        kept = metrics.parent / f"metrics.damaged-{copies}.jsonl"
        assert kept.read_bytes() == broken
        assert f"is kept as {kept}" in caplog.text
    assert "metrics.jsonl: line 6 is damaged and left out" in caplog.text
    assert list(map(str, read_metrics(metrics))) == lines[:5]


def test_of_metrics_the_last_line_alone_may_be_cut_off(metrics):
    whole, lines = metrics.read_bytes(), list(map(str, read_metrics(metrics)))
    for cut in (2, 60):
        metrics.write_bytes(whole[:-cut])
        assert (list(map(str, read_metrics(metrics))), read_lines(metrics)[1]) == (lines[:5], [])
    plain = b'{"step": 1, "split": "train", "loss": 2.0}\n'  # of an earlier version
    metrics.write_bytes(plain)
    assert read_lines(metrics) == ([{"step": 1, "split": "train", "loss": 2.0}], [])
    metrics.write_bytes(plain + b"3\n" + whole)
    assert read_lines(metrics)[1] == [1, 2]


def test_a_heart_beats_now_and_then(tmp_path):
    hands = Hands()
    heart = Heartbeat(epath.Path(tmp_path), 100, hands)

    def status():
        return json.loads((tmp_path / "heartbeat.json").read_text())

    beats = (0, 10, 10), (20, 14, 10), (30, 16, 16), (59, 20, 16), (60, 22, 22)
    for seconds, step, seen in beats:
        hands.at = 100 + seconds
        heart.beat(step)
        assert status()["step"] == seen
    heart.beat(22, "eval")
    assert status()["doing"] == "train"
    heart.beat(23, "stopped")
    assert [status()[name] for name in ("step", "doing", "total_steps")] == [23, "stopped", 100]
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_only_the_steps_of_the_span_are_traced(tmp_path):
    profiler = Profiler((3, 5), epath.Path(tmp_path))
    square = jax.jit(lambda x: x @ x)
    for step in range(1, 10):
        with profiler.around(step), jax.profiler.TraceAnnotation(f"inside_{step}"):
            out = square(jnp.ones((64, 64)))
        profiler.after(step, out, last=step == 9)
    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = file.read_bytes()
    assert TRACED.encode() in content
    assert [step for step in range(1, 10) if f"inside_{step}".encode() in content] == [3, 4]
