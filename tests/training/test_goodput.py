"""Rates, goodput and the sums that outlive a restart, by a clock that the test moves."""

import pytest
from etils import epath
from runs import TIMED

from zephyr_jax.training.metrics import Clock, Meter, MetricsFile, read_metrics


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
        clock.begin_step()
        hands.at += work
        meter.add({"tokens": 20, "target_tokens": 10, "weight": 10})
        clock.end_step()
    return meter


def test_goodput_is_the_share_of_time_inside_steps():
    hands = Hands()
    clock = Clock(100, began=70.0, now=hands)  # 30 s until here: data, restore
    first = clock.read(steps_of(clock, hands, 1, 1, 9), 1, pairs=False)  # compiles
    assert first["goodput"] == 0
    assert first["wall_s"] == 40
    meter = steps_of(clock, hands, 4, wait=1, work=4)
    said = clock.read(meter, 5, pairs=False)
    assert said["productive_s"] == 16
    assert said["wall_s"] == 60
    assert said["goodput"] == pytest.approx(16 / 60)
    assert said["target_tokens_per_s"] == pytest.approx(40 / 20)
    hands.at += 40  # an evaluation
    clock.skip()
    said = clock.read(steps_of(clock, hands, 5, 0, 4), 10, pairs=False)
    assert said["productive_s"] == 36
    assert said["wall_s"] == 120
    assert said["goodput"] == pytest.approx(0.3)
    assert said["target_tokens_per_s"] == pytest.approx(50 / 20)
    assert said.keys() <= TIMED


def test_a_run_that_goes_on_continues_its_sums():
    hands = Hands()
    clock = Clock(100, before=(1000.0, 600.0), now=hands)
    said = clock.read(steps_of(clock, hands, 3, 1, 4), 3, pairs=True)
    assert said["wall_s"] == 1015
    assert said["productive_s"] == 608
    assert said["goodput"] == pytest.approx(8 / 15)
    assert said.keys() <= TIMED


def test_steps_that_are_repeated_were_not_productive(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    assert MetricsFile(path, 0).before == (0, 0)
    metrics = MetricsFile(path, 0)
    for step in (5, 10, 15):
        metrics.write(step, "train", {"wall_s": 10.0 * step, "productive_s": 6.0 * step})
    assert MetricsFile(path, 10).before == (150, 60)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_mfu_is_the_share_of_the_peak():
    from zephyr_jax.chips import peak_flops

    ticks = iter([0.0, 10.0])
    clock = Clock(100, now=lambda: next(ticks), step_at_peak=0.5)
    meter = Meter()
    for _ in range(8):
        meter.add({"weight": 1.0})
    assert clock.read(meter, 8, pairs=False)["mfu"] == pytest.approx(8 * 0.5 / 10)
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
