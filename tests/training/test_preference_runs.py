"""Whole preference runs by `fit`: adapters, moving references, no reference, held-out pairs."""

import dataclasses

import jax
import numpy as np
import pytest
from test_loop import EIGHT, ONE, Killed, config_of, kill_at, mesh_of

import zephyr_jax as zj
from zephyr_jax.config.run import PROJECTIONS, LoraConfig
from zephyr_jax.evaluation.pairs import load_table, pair_metrics
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.training.setup import pack

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=PROJECTIONS)


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with mesh_of(ONE):
        yield


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A model to begin with: two steps of SFT."""
    folder = tmp_path_factory.mktemp("base")
    zj.fit(config_of(world, "sft", max_steps=2), folder)
    return folder


def run_of(world, base, lora=None, steps=10, **dpo):
    config = config_of(world, "dpo", max_steps=steps, log_every=1)
    optim = dataclasses.replace(config.optim, peak_lr=1e-2)
    dpo = dataclasses.replace(config.dpo, **dpo)
    return dataclasses.replace(config, init=str(base), optim=optim, dpo=dpo, lora=lora)


def evals(workdir):
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["split"] == "eval"]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


@pytest.mark.parametrize("mode", ["adapter_off", "precomputed"])
def test_adapters_learn_beside_a_frozen_base(world, base, tmp_path, mode):  # pitfall 21
    config = run_of(world, base, LORA, reference=mode)
    state = zj.fit(config, tmp_path)
    first, last = evals(tmp_path)
    # Dropout is for training alone: the first evaluation is at the reference, to the bit.
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["eval_rewards/ties"] == 1
    assert first["eval_kl"] == first["eval_drift/chosen"] == 0
    assert last["eval_loss"] < first["eval_loss"] - 1e-3
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert len(names) == 14
    table = load_table(tmp_path / "evaluations" / "000010.npz")
    assert len(table.ids) == len(set(table.ids.tolist())) > 0
    for name, value in pair_metrics(table, config.dpo.beta).items():
        assert last[f"eval_{name}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_adapters_resume_to_the_bit(world, base, tmp_path, monkeypatch):
    config = run_of(world, base, LORA, reference="adapter_off")
    whole = zj.fit(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            zj.fit(config, tmp_path / "cut")
    assert_equal(whole, zj.fit(config, tmp_path / "cut"))


def test_another_base_is_refused_on_resume(world, base, tmp_path):
    config = run_of(world, base, LORA, steps=2, reference="adapter_off")
    zj.fit(config, tmp_path / "run")
    other = config_of(world, "sft", max_steps=4)
    zj.fit(other, tmp_path / "other")
    moved = base.rename(tmp_path / "kept")
    try:
        (tmp_path / "other").rename(base)
        with pytest.raises(ValueError, match="was begun with parameters of digest .* now are"):
            zj.fit(config, tmp_path / "run")
    finally:
        base.rename(tmp_path / "other")
        moved.rename(base)


@pytest.mark.slow
def test_adapters_train_alike_on_eight_devices(world, base, tmp_path):
    config = run_of(world, base, LORA, steps=4, reference="adapter_off")
    zj.fit(config, tmp_path / "one")
    with mesh_of(EIGHT):
        zj.fit(config, tmp_path / "eight")
    one, eight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "eight"))
    for a, b in zip(one, eight, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_moving_reference_is_moved_and_resumed(world, base, tmp_path, monkeypatch, lora):
    config = run_of(world, base, lora, reference="synced", ref_sync_steps=3, ref_sync_alpha=0.25)
    whole = zj.fit(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            zj.fit(config, tmp_path / "cut")
    assert_equal(whole, zj.fit(config, tmp_path / "cut"))
    still = run_of(world, base, lora, reference="synced", ref_sync_steps=100)
    far = zj.fit(still, tmp_path / "still")
    rewards = [evals(tmp_path / name)[-1]["eval_rewards/margins"] for name in ("whole", "still")]
    assert abs(rewards[0]) < abs(rewards[1])  # nearer to a reference that follows
    changed = [np.any(a != b) for a, b in zip(*map(_leaves, (whole, far)), strict=True)]
    assert all(changed)


def _leaves(state):
    return [jax.device_get(x) for x in jax.tree.leaves(state.reference)]


def test_a_moving_reference_that_stands_still_is_a_stored_one(world, base, tmp_path):
    moving = zj.fit(run_of(world, base, steps=3, reference="synced"), tmp_path / "synced")
    stored = zj.fit(run_of(world, base, steps=3, reference="precomputed"), tmp_path / "stored")
    for a, b in zip(_params(moving), _params(stored), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _params(state):
    return [jax.device_get(x) for x in jax.tree.leaves(state.params)]


def test_no_reference_is_scored_where_none_is_needed(world, base, tmp_path, monkeypatch):
    from zephyr_jax.training import reference_modes

    monkeypatch.setattr(reference_modes, "compute_reference", None)
    zj.fit(run_of(world, base, steps=3, loss="simpo", reference="none", beta=2.0), tmp_path)
    first, last = evals(tmp_path)
    assert first["eval_rewards/chosen"] == pytest.approx(2 * first["eval_logps/chosen"], rel=1e-6)
    assert last["eval_loss"] != first["eval_loss"]


@pytest.mark.slow
def test_unshared_prompts_give_the_same_run(world, base, tmp_path):
    shared = run_of(world, base, steps=4)
    twice = run_of(world, base, steps=4, share_prompt=False)
    # Rows in which both fit: a pair that did not would be left out.
    shared, twice = (
        dataclasses.replace(c, data=dataclasses.replace(c.data, seq_len=256))
        for c in (shared, twice)
    )
    states = [zj.fit(c, tmp_path / str(i)) for i, c in enumerate((shared, twice))]
    rows = [read_metrics(tmp_path / str(i) / "metrics.jsonl") for i in range(2)]
    for a, b in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_logps/chosen"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert int(states[0].step) == int(states[1].step) == 4
    told = [pack(c, 1).manifest["splits"]["train"] for c in (shared, twice)]
    assert told[0]["documents"] == told[1]["documents"]
    assert told[0]["tokens"] < told[1]["tokens"]


def test_a_reference_serves_runs_that_pack_otherwise(world, base, tmp_path, caplog):
    zj.fit(run_of(world, base, steps=1), tmp_path / "a")
    with caplog.at_level("INFO"):
        zj.fit(run_of(world, base, steps=1, share_prompt=False, beta=0.3), tmp_path / "b")
    assert "rewards at step 0 are 0 but for rounding" in caplog.text
    assert abs(evals(tmp_path / "b")[0]["eval_rewards/margins"]) < 1e-4
