"""Runs with adapters: what they save, and how a model is made of that and its base."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_lora import flat

import zephyr_jax as zj
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.lora import adapter_shapes, merge
from zephyr_jax.weights.checksums import params_digest
from zephyr_jax.weights.sources import load_adapters


def run_config(world, kind, base, **lora):
    config = runs.config_of(world, kind, max_steps=2, checkpoint_every=1)
    fields = {"rank": 2, "alpha": 5.0, "dropout": 0.1, "targets": ("q", "v", "o", "down")} | lora
    return dataclasses.replace(config, init=str(base), lora=LoraConfig(**fields))


@pytest.fixture
def base(world, tmp_path):
    """A base on disk, which a run adapts."""
    with runs.mesh_of(runs.ONE):
        config = runs.config_of(world, "sft")
        tok = zj.Tokenizer.from_folder(world / "tokenizer")
        zj.export_hf(
            config.model, zj.init_params(config.model, jax.random.key(3)), tok, tmp_path / "base"
        )
    return tmp_path / "base"


def test_a_run_saves_its_adapters_alone_and_loads_merged(world, tmp_path, base):
    config = run_config(world, "sft", base)
    with runs.mesh_of(runs.ONE):
        state = zj.fit(config, tmp_path / "run")
        cfg, lora, adapters, meta = load_adapters(tmp_path / "run")
        assert (cfg, lora) == (config.model, config.lora)
        whole = zj.load_model(base)
        first, digest = whole.params, params_digest(whole.params)
        assert meta["base"] == {"source": str(base), "digest": digest}
        got, wanted = flat(adapters), flat(state.params)
        assert got.keys() == wanted.keys() == adapter_shapes(cfg, lora).keys()
        for path, x in got.items():
            np.testing.assert_array_equal(x, wanted[path], path)
            assert x.any()  # b too has moved
        model, wanted = zj.load_model(tmp_path / "run"), merge(first, adapters, lora)
        for path, x in flat(model.params).items():
            np.testing.assert_array_equal(x, flat(wanted)[path], path)
        narrow = zj.load_model(tmp_path / "run" / "checkpoints" / "2", dtype="bfloat16").params
        for path, x in flat(narrow).items():
            np.testing.assert_array_equal(x, flat(wanted)[path].astype(jnp.bfloat16), path)
        # What is saved of the merged model is a whole model, which needs no base.
        zj.save_model(model, tmp_path / "merged")
        shutil.rmtree(base)
        assert params_digest(zj.load_model(tmp_path / "merged").params) == params_digest(wanted)
        with pytest.raises(FileNotFoundError, match=r"run has adapters for .*base, .* put it back"):
            zj.load_model(tmp_path / "run")
        first["final_norm"] = first["final_norm"].at[3].add(1e-3)  # pitfall 45
        zj.export_hf(*whole[:3], base)
        with pytest.raises(ValueError, match=f"run has .*{digest}, but .*base has .*; restore"):
            zj.load_model(tmp_path / "run")


def test_a_base_is_found_from_wherever_the_run_is(world, tmp_path, base, monkeypatch):
    folder = tmp_path / "here" / "runs"
    folder.mkdir(parents=True)
    shutil.move(base, folder / "base")
    monkeypatch.chdir(tmp_path / "here")
    with runs.mesh_of(runs.ONE):
        zj.fit(run_config(world, "sft", "runs/base"), "runs/run")
        wanted = params_digest(zj.load_model("runs/run").params)
        monkeypatch.chdir(tmp_path)
        assert params_digest(zj.load_model("here/runs/run").params) == wanted
        shutil.move(tmp_path / "here", tmp_path / "there")
        assert params_digest(zj.load_model(tmp_path / "there" / "runs" / "run").params) == wanted


def test_a_preference_run_adapts_an_adapted_model(world, tmp_path, base):
    """Adapters on adapters: the second run's base is the first one, merged."""
    with runs.mesh_of(runs.ONE):
        zj.fit(run_config(world, "sft", base), tmp_path / "sft")
        second = run_config(world, "dpo", tmp_path / "sft", targets=("k", "gate"), rank=3)
        second = dataclasses.replace(
            second, dpo=dataclasses.replace(second.dpo, reference="adapter_off")
        )
        zj.fit(second, tmp_path / "dpo")
        middle = zj.load_model(tmp_path / "sft").params
        _, lora, adapters, meta = load_adapters(tmp_path / "dpo")
        assert meta["base"]["digest"] == params_digest(middle)
        got = params_digest(zj.load_model(tmp_path / "dpo").params)
        assert got == params_digest(merge(middle, adapters, lora))
        first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["step"] == 0
        assert abs(first["eval_loss" if "eval_loss" in first else "loss"] - np.log(2)) < 1e-6


def test_a_whole_model_has_no_adapters(world, tmp_path, base):
    with pytest.raises(ValueError, match="holds no adapters of a run"):
        load_adapters(base)
    with runs.mesh_of(runs.ONE):
        zj.save_model(zj.load_model(base), tmp_path / "whole")
    with pytest.raises(ValueError, match="holds no adapters but a whole model; use --format=hf"):
        load_adapters(tmp_path / "whole")
