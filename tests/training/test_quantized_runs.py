"""Runs with adapters on a quantized base."""

import dataclasses

import jax
import numpy as np
import pytest
import runs
from test_lora import flat
from test_quantized import SIZES

import zephyr_jax as zj
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.lora import merge
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checksums import params_digest
from zephyr_jax.weights.sources import load_adapters

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=("q", "v", "o", "down"))


def run_config(world, kind, base, held):
    config = runs.config_of(world, kind, max_steps=6, checkpoint_every=3, log_every=1)
    model = dataclasses.replace(config.model, **SIZES, num_hidden_layers=2)
    optim = dataclasses.replace(config.optim, peak_lr=1e-2)
    lora = dataclasses.replace(LORA, base=held)
    return dataclasses.replace(config, init=str(base), model=model, optim=optim, lora=lora)


def save_base(world, folder, seed):
    model = run_config(world, "sft", folder, "nf4").model
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    zj.export_hf(model, zj.init_params(model, jax.random.key(seed)), tok, folder)


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with runs.mesh_of(runs.ONE):
        yield


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    save_base(world, folder, 3)
    return folder


def rows_of(workdir, split):
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["split"] == split]


@pytest.mark.slow
@pytest.mark.parametrize("held", ["int8", "nf4"])
def test_a_run_trains_resumes_and_belongs_to_its_base(world, base, tmp_path, monkeypatch, held):
    config = run_config(world, "sft", base, held)
    whole = zj.fit(config, tmp_path / "whole")
    first, last = (rows_of(tmp_path / "whole", "eval")[i]["eval_loss"] for i in (0, -1))
    assert last < first - 0.02
    with monkeypatch.context() as patch:
        runs.kill_at(patch, 5)
        with pytest.raises(runs.Killed):
            zj.fit(config, tmp_path / "cut")
    resumed = zj.fit(config, tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
    # Adapters are merged with the full base, whose digest they name.
    _, lora, adapters, meta = load_adapters(tmp_path / "cut")
    full = zj.load_model(base).params
    assert lora.base == held
    assert meta["config"]["lora"]["base"] == held
    assert meta["base"]["digest"] == params_digest(full)
    merged = flat(zj.load_model(tmp_path / "cut").params)
    for path, x in flat(merge(full, adapters, lora)).items():
        np.testing.assert_array_equal(merged[path], x, path)
    for other in {"full", "int8", "nf4"} - {held}:
        with pytest.raises(ValueError, match=f"lora.base was '{held}', is '{other}'"):
            zj.fit(run_config(world, "sft", base, other), tmp_path / "cut")
    save_base(world, tmp_path / "other", 4)
    with pytest.raises(ValueError, match="began with parameters of digest .* now are"):
        zj.fit(run_config(world, "sft", tmp_path / "other", held), tmp_path / "cut")


@pytest.mark.slow
def test_the_reference_is_the_base_as_it_is_held(world, base, tmp_path):
    digests, logps = [], []
    for mode, held in (("precomputed", "full"), ("precomputed", "nf4"), ("adapter_off", "nf4")):
        config = run_config(world, "dpo", base, held)
        assert config.dpo is not None
        config = dataclasses.replace(
            config,
            dpo=dataclasses.replace(config.dpo, reference=mode),
            train=dataclasses.replace(config.train, max_steps=1),
        )
        zj.fit(config, tmp_path / (mode + held))
        first = rows_of(tmp_path / (mode + held), "eval")[0]
        assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first["eval_rewards/ties"] == 1
        logps.append(first["eval_logps/chosen"])
        digests.append(load_adapters(tmp_path / (mode + held)).meta["reference_digest"])
    assert abs(logps[0] - logps[1]) > 0.1
    assert logps[1] == logps[2]
    assert digests[0] != digests[1]  # no file is shared
    assert digests[1] == digests[2]


def test_a_base_that_has_no_blocks_is_refused_before_it_is_loaded(world, tmp_path):
    config = run_config(world, "sft", tmp_path / "nowhere", "nf4")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head_dim=10))
    with pytest.raises(ValueError, match=r"axis H=10 of layers/attention/o .* lora.base=full"):
        zj.fit(config, tmp_path / "run")
