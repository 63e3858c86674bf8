"""Whole preference runs: adapters, synced references, no reference, held-out pairs."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from conftest import with_fields
from runs import assert_equal, config_of, killed_and_resumed, metrics_of

import zephyr_jax as zj
from zephyr_jax.config.run import PROJECTIONS, LoraConfig
from zephyr_jax.data.packing.batches import read_batches
from zephyr_jax.evaluation.pairs import load_table, pair_means
from zephyr_jax.training import reference
from zephyr_jax.training.loop import device_batch, fit
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.training.setup import setup
from zephyr_jax.weights.checkpoint import params_digest

pytestmark = pytest.mark.usefixtures("one_device")
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=PROJECTIONS)


def run_of(sft_run, world, lora=None, steps=10, **dpo):
    """A preference run that begins with the model of the short SFT run."""
    config, init = config_of(world, "dpo", max_steps=steps), str(sft_run.workdir)
    return with_fields(config, init=init, optim={"peak_lr": 1e-2}, dpo=dpo, lora=lora)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter_off", "precomputed"])
def test_adapters_of_a_frozen_base_learn(sft_run, world, tmp_path, mode):  # pitfall 21
    config = run_of(sft_run, world, LORA, reference=mode)
    state = fit(config, tmp_path / "run")
    first, last = metrics_of(tmp_path / "run", "eval")
    # Dropout is for training alone: the first evaluation is at the reference, to the bit.
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["eval_rewards/ties"] == 1
    assert first["eval_kl"] == first["eval_drift/chosen"] == 0
    assert last["eval_loss"] < first["eval_loss"] - 1e-3
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert len(names) == 14
    table = load_table(tmp_path / "run" / "evaluations" / "000010.npz")
    assert len(table.ids) == len(set(table.ids.tolist())) > 0
    for name, value in pair_means(table, config.dpo.beta).items():
        assert last[f"eval_{name}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_synced_reference_is_moved_and_resumed(sft_run, world, tmp_path, monkeypatch, lora):
    settings = {"ref_sync_steps": 3, "ref_sync_alpha": 0.25}
    gentle = {"peak_lr": 1e-3}  # at ten times that the sign of the mean margin is noise
    config = run_of(sft_run, world, lora, reference="synced", options=settings)
    config = with_fields(config, optim=gentle)
    whole = fit(config, tmp_path / "whole")
    assert_equal(whole, killed_and_resumed(monkeypatch, config, tmp_path / "cut"))
    still = run_of(sft_run, world, lora, reference="synced", options={"ref_sync_steps": 100})
    far = fit(with_fields(still, optim=gentle), tmp_path / "still")
    ends = (metrics_of(tmp_path / name, "eval")[-1] for name in ("whole", "still"))
    rewards = [abs(end["eval_rewards/margins"]) for end in ends]
    assert rewards[0] < rewards[1]  # nearer to a reference that follows
    near, away = (
        jax.device_get(optax.tree.norm(optax.tree.sub(state.params, state.reference)))
        for state in (whole, far)
    )
    assert near < 0.7 * away
    moved, stood = (jax.device_get(jax.tree.leaves(state.reference)) for state in (whole, far))
    assert all(np.any(a != b) for a, b in zip(moved, stood, strict=True))


def test_no_reference_is_scored_where_none_is_needed(sft_run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "compute_reference", None)
    run = setup(run_of(sft_run, world, loss="simpo", reference="none", beta=2.0), tmp_path)
    host = next(iter(read_batches(run.packed, run.plan, "train", 0, 1, 0)))
    assert not np.asarray(device_batch(run, host, run.state).ref_logps).any()


def test_a_stored_reference_serves_runs_that_pack_otherwise(dpo_run, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "compute_reference", None)
    run = setup(with_fields(dpo_run.config, data={"seq_len": 256}), tmp_path / "b")
    assert run.packed.manifest["seq_len"] == 256


@pytest.mark.parametrize("mode", ["precomputed", "in_memory", "synced", "adapter_off"])
def test_a_later_round_is_held_to_another_model_than_it_begins_with(
    sft_run, dpo_run, world, tmp_path, mode
):
    lora = LORA if mode == "adapter_off" else None
    config = run_of(dpo_run, world, lora, reference=mode, reference_model=str(sft_run.workdir))
    run = setup(config, tmp_path)
    digest = params_digest(sft_run.state.params)
    assert run.meta["reference"]["parameters"] == run.meta["reference_model"]["digest"] == digest
    assert run.meta["init_digest"] == params_digest(dpo_run.state.params) != digest
    assert f"held to parameters of digest {digest[:16]}" in run.meta["lineage"][-1]
    host = next(iter(read_batches(run.packed, run.plan, "train", 0, 1, 0)))
    batch = device_batch(run, host, run.state)
    n_pairs = run.packed.manifest["pairs_per_row"]
    score = jax.jit(functools.partial(reference_logps, config.model, n_pairs=n_pairs))
    held_to, begun = (score(x.state.params, batch.rows) for x in (sft_run, dpo_run))
    there = np.asarray(batch.pair_mask)[..., None]
    np.testing.assert_allclose(batch.ref_logps * there, held_to * there, atol=1e-4)
    assert np.abs((held_to - begun) * there).max() > 1e-2


def test_a_reference_model_that_does_not_fit_is_refused(sft_run, dpo_run, world, tmp_path, tok):
    other = str(sft_run.workdir)
    for words, message in (
        ({"reference": "none", "loss": "simpo"}, "compares with no model"),
        ({"reference": "synced", "lora": LORA}, "moves adapters of the run's own base"),
    ):
        with pytest.raises(ValueError, match=message):
            run_of(dpo_run, world, words.pop("lora", None), reference_model=other, **words)
    model = dataclasses.replace(dpo_run.config.model, vocab_size=tok.vocab_size)
    folder = tmp_path / "other"
    zj.export_hf(model, zj.init_params(model, jax.random.key(0)), tok, folder)
    config = run_of(dpo_run, world, reference_model=str(folder))
    with pytest.raises(ValueError, match="dpo.reference_model=.* was trained with another token"):
        setup(config, tmp_path / "run")
    run_tok = zj.Tokenizer.from_folder(dpo_run.workdir)
    model = dataclasses.replace(dpo_run.config.model, vocab_size=408)
    zj.export_hf(model, zj.init_params(model, jax.random.key(0)), run_tok, tmp_path / "wider")
    config = run_of(dpo_run, world, reference_model=str(tmp_path / "wider"))
    with pytest.raises(ValueError, match="wider is another model: vocab_size is 408, config.model"):
        setup(config, tmp_path / "run")
    with pytest.raises(ValueError, match="reference_model was '', is '.*/wider'"):
        setup(
            with_fields(dpo_run.config, dpo={"reference_model": str(tmp_path / "wider")}),
            dpo_run.workdir,
        )
