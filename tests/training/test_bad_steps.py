"""Steps that are not finite, or spikes: left out, kept, explained; and who is to blame."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_fields
from runs import assert_equal, metrics_of

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.evaluation import bad_steps
from zephyr_jax.training import loop
from zephyr_jax.training.loop import fit
from zephyr_jax.training.optim import is_spike
from zephyr_jax.training.setup import setup
from zephyr_jax.weights.checkpoint import saved_steps

pytestmark = pytest.mark.usefixtures("one_device")


def poisoned(monkeypatch, *steps):
    """The reference's log-probs of these steps' batches are nan."""
    device_batch = loop.device_batch

    def poison(run, host, state):
        batch = device_batch(run, host, state)
        bad = int(state.step) + 1 in steps
        return batch._replace(ref_logps=batch.ref_logps * (jnp.nan if bad else 1.0))

    monkeypatch.setattr(loop, "device_batch", poison)


def with_value(params, name, row, value):
    array = np.array(params[name])
    array[row] = value
    return params | {name: jax.device_put(array, params[name].sharding)}


@pytest.fixture(scope="module")
def stopped(dpo_run, one_device, tmp_path_factory):
    """The short run, as it stopped at its third step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 3)
        message = "step 3 has loss nan, its gradient norm nan: the update was not .*replay_batch"
        with pytest.raises(FloatingPointError, match=f"{message}.*in another --workdir"):
            fit(with_fields(dpo_run.config, train={"checkpoint_every": 2}), folder)
    return folder


def test_a_bad_step_stops_the_run_just_before_it(dpo_run, stopped, tmp_path, record_property):
    stopped = shutil.copytree(stopped, tmp_path / "run")
    assert saved_steps(stopped) == [2]
    assert [row["step"] for row in metrics_of(stopped, "train")] == [1, 2]
    kept, parts = np.load(stopped / "bad_steps" / "3-0.npz"), setup(dpo_run.config, stopped)
    (host,) = loop.read_batches(parts.packed, parts.plan, "train", 2, 3, dpo_run.config.seed)
    np.testing.assert_array_equal(kept["tokens"], host.rows.tokens)
    np.testing.assert_array_equal(kept["pair_ids"], host.pair_ids)
    assert_equal(fit(dpo_run.config, stopped), dpo_run.state)  # nothing of it was learned
    record_property("cell", ["train", "NaN in a step", "stops, 0 steps lost; then the same result"])


def test_as_many_bad_steps_as_the_policy_says_are_left_out(dpo_run, tmp_path, monkeypatch):
    poisoned(monkeypatch, 3, 6, 7)
    config = with_fields(dpo_run.config, train={"bad_steps": {"skip": 2}, "log_every": 2})
    with pytest.raises(FloatingPointError, match="step 7 has loss nan"):
        fit(config, tmp_path)
    rows = metrics_of(tmp_path, "train")
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 1, 1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert saved_steps(tmp_path)[-1] == 6
    kept = sorted(path.name for path in (tmp_path / "bad_steps").iterdir())
    assert kept == ["3-0.npz", "6-0.npz", "7-0.npz"]
    assert int(fit(with_fields(config, train={"bad_steps": {"skip": 3}}), tmp_path).step) == 10


def test_the_replay_names_the_document_that_is_to_blame(stopped, monkeypatch, capsys):
    main(["replay_batch", str(stopped), "3"])
    lines = capsys.readouterr().out.splitlines()
    kept = np.load(stopped / "bad_steps" / "3-0.npz")
    ids = kept["pair_ids"][kept["pair_ids"] != 0]
    assert len(lines) == len(ids) + 2
    for number, line in zip(ids, lines[1:], strict=False):
        assert f"pair {number}  loss " in line
    assert "none is to blame" in lines[-1]
    assert str(stopped / "checkpoints" / "2") in lines[0]
    holders = {}  # token -> pairs that hold it
    for row, (segments, tokens) in enumerate(zip(kept["segments"], kept["tokens"], strict=True)):
        for k, token in zip(segments, tokens, strict=True):
            if k:
                holders.setdefault(int(token), set()).add(int(kept["pair_ids"][row, k - 1]))
    token, (culprit,) = next((t, pairs) for t, pairs in holders.items() if len(pairs) == 1)
    load = bad_steps.load_model

    def overflowing(*args):
        model = load(*args)
        return model._replace(params=with_value(model.params, "embed", token, 3e38))

    monkeypatch.setattr(bad_steps, "load_model", overflowing)
    verdict = bad_steps.replay(str(stopped), 3)[-1]
    assert verdict.startswith("to blame: row ")
    assert verdict.endswith(f"pair {culprit}")
    with pytest.raises(FileNotFoundError, match="no batch of step 4"):
        bad_steps.replay(str(stopped), 4)
    damaged = bytearray((stopped / "bad_steps" / "3-0.npz").read_bytes())
    damaged[500] ^= 1
    (stopped / "bad_steps" / "5-0.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"5-0.npz is damaged \("):
        bad_steps.replay(str(stopped), 5)


def test_a_spike_is_far_above_the_median_of_the_losses_before():
    recent = jnp.asarray(np.random.default_rng(0).normal(2.0, 0.1, 32), jnp.float32)
    assert not is_spike(jnp.float32(2.3), recent, 6.0)
    assert is_spike(jnp.float32(2.9), recent, 6.0)
    assert not is_spike(jnp.float32(1.0), recent, 6.0)
    assert not is_spike(jnp.float32(99.0), recent.at[3].set(jnp.nan), 6.0)  # too few so far


def test_numbers_that_are_not_finite_are_refused_before_the_first_step(dpo_run, tmp_path):
    model = zj.load_model(dpo_run.workdir)
    params = with_value(model.params, "head", 3, np.inf)
    zj.save_model(model._replace(params=params), tmp_path / "bad")
    bad = str(tmp_path / "bad")
    for field in ({"init": bad}, {"dpo": {"reference_model": bad}}):
        with pytest.raises(ValueError, match=r"\['head'\] has values that are not finite in"):
            setup(with_fields(dpo_run.config, **field), tmp_path / "run")
    run = setup(dpo_run.config, tmp_path / "run")
    state = run.state._replace(params=params)
    with pytest.raises(FloatingPointError, match="after step 0 .*'head'.* not finite, so"):
        run.checkpointer.save(state, run.meta)
