"""The best step by a held-out metric: found, kept, named, and reason to end a run early."""

import dataclasses
import json

import pytest
from etils import epath
from runs import Killed, assert_equal, config_of, kill_at, metrics_of

from zephyr_jax.__main__ import main
from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation.metrics_file import BestStep
from zephyr_jax.storage import read_checked
from zephyr_jax.training import loop
from zephyr_jax.training.loop import fit
from zephyr_jax.weights.checkpoint import saved_steps, step_folder
from zephyr_jax.weights.sources import load_model, resolve

pytestmark = pytest.mark.usefixtures("one_device")
LOSSES = {1: 3.0, 2: 2.0, 3: 1.0, 4: 1.5, 5: 1.25, 6: 1.125, 7: 1.0, 8: 0.5, 9: 4.0, 10: 5.0}


def rows_of(values, metric="eval_loss"):
    return [{"split": "eval", "step": step, metric: value} for step, value in values.items()]


def train_of(wanted):
    return dataclasses.replace(load_config("demo_sft").train, keep_best=wanted)


@pytest.mark.parametrize(
    ("wanted", "best"), [("loss", 8), ("eval_loss", 8), ("max:loss", 10), ("min:loss", 8), ("", 0)]
)
def test_the_best_step_is_the_lowest_loss_or_what_is_asked_for(wanted, best, tmp_path):
    kept = BestStep(epath.Path(tmp_path), train_of(wanted), rows_of(LOSSES | {0: 0.1}), range(11))
    assert kept.step == best
    assert kept.since == (10 - best if wanted else 0)
    accuracy = rows_of(LOSSES, "eval_rewards/accuracies")
    high = BestStep(epath.Path(tmp_path), train_of("rewards/accuracies"), accuracy, range(11))
    assert high.step == 10


def test_a_step_that_was_not_saved_is_not_the_best(tmp_path):
    kept = BestStep(epath.Path(tmp_path), train_of("loss"), rows_of(LOSSES), (2, 4, 10))
    assert kept.step == 4
    assert not kept.after(11, {"eval_loss": 1.5})
    assert kept.after(12, {"eval_loss": 1.25})


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses are those of LOSSES."""
    write, after = loop.MetricsFile.write, BestStep.after

    def changed(step, values):
        return values | ({"eval_loss": LOSSES[step]} if step in LOSSES else {})

    monkeypatch.setattr(
        loop.MetricsFile,
        "write",
        lambda self, at, split, x: write(self, at, split, changed(at, x) if split == "eval" else x),
    )
    monkeypatch.setattr(BestStep, "after", lambda self, at, x: after(self, at, changed(at, x)))


def run_of(world, **train):
    often = {"eval_every": 1, "checkpoint_every": 2, "keep_checkpoints": 1, "keep_best": "loss"}
    return config_of(world, "sft", **often | train)


def test_the_best_step_is_kept_over_a_kill_and_can_be_named(world, tmp_path, losses, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            fit(run_of(world), folder)
    assert json.loads((folder / "best.json").read_text())["step"] == 3
    fit(run_of(world), folder)
    assert saved_steps(epath.Path(folder)) == [8, 10]
    assert read_checked(folder / "best.json") == {"step": 8, "metric": "eval_loss", "value": 0.5}
    assert resolve(folder / "checkpoints" / "best") == folder / "checkpoints" / "8"
    model = load_model(folder / "checkpoints" / "best")
    assert model.lineage["step"] == 8
    main(["port_weights", "export", str(folder), str(tmp_path / "hf"), "--step=best"])
    exported = load_model(tmp_path / "hf", dtype="bfloat16").params["embed"]
    assert_equal(exported, model.params["embed"].astype("bfloat16"))


def test_a_run_ends_early_and_stays_ended(world, tmp_path, losses):
    config = run_of(world, keep_best={"loss": 3})
    assert int(fit(config, tmp_path / "run").step) == 6  # after 3 none of 4, 5, 6 is better
    assert saved_steps(epath.Path(tmp_path / "run")) == [3, 6]
    assert int(fit(config, tmp_path / "run").step) == 6
    assert metrics_of(tmp_path / "run")[-1]["step"] == 6


def test_a_step_that_a_run_lacks_is_answered_with_those_that_it_has(sft_run, tmp_path, refused):
    for step in ("x", "99", "-1"):
        said = refused("port_weights", "export", sft_run.workdir, tmp_path / "hf", f"--step={step}")
        assert f"--step={step} is no step of {sft_run.workdir}, which has 5, 10" in said
    with pytest.raises(ValueError, match="x is not that of a step; the run has 5, 10"):
        load_model(sft_run.workdir / "checkpoints" / "x")
    with pytest.raises(FileNotFoundError, match="has no best step: it was trained without train.k"):
        step_folder(epath.Path(sft_run.workdir) / "checkpoints" / "best")
