"""Runs with adapters: what they save, and how a model is made of that and its base."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import with_fields
from test_lora import flat
from test_quantized import SIZES

import zephyr_jax as zj
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.lora import adapter_shapes, merge
from zephyr_jax.training.loop import fit
from zephyr_jax.weights.checkpoint import params_digest
from zephyr_jax.weights.sources import load_adapters

pytestmark = pytest.mark.usefixtures("one_device")
LORA = LoraConfig(rank=2, alpha=5.0, dropout=0.1, targets=("q", "v", "o", "down"))


def run_config(world, kind, base, lora=LORA, **train):
    config = runs.config_of(world, kind, **({"max_steps": 2, "checkpoint_every": 1} | train))
    return dataclasses.replace(config, init=str(base), lora=lora)


def quantized_config(world, kind, base, held):
    """Sizes with whole blocks, and a rate at which six steps show."""
    lora = dataclasses.replace(LORA, rank=4, alpha=8.0, base=held)
    config = run_config(world, kind, base, lora, max_steps=6, checkpoint_every=3)
    return with_fields(config, model=SIZES | {"num_hidden_layers": 2}, optim={"peak_lr": 1e-2})


def save_base(world, model, folder, seed=3):
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    zj.export_hf(model, zj.init_params(model, jax.random.key(seed)), tok, folder)
    return folder


def assert_params(params, wanted):
    for path, x in flat(params).items():
        np.testing.assert_array_equal(x, flat(wanted)[path], path)


@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory):
    """A folder with `runs/base` and `runs/run`, which names it so; the run's last state."""
    root = tmp_path_factory.mktemp("adapted")
    save_base(world, runs.config_of(world, "sft").model, root / "runs" / "base")
    with contextlib.chdir(root):
        return root, fit(run_config(world, "sft", "runs/base"), "runs/run")


def test_a_run_saves_its_adapters_alone_and_loads_merged(adapted, tmp_path):
    root, state = adapted
    shutil.copytree(root, tmp_path / "there")  # the base is found from wherever the run is
    base, run = (tmp_path / "there" / "runs" / name for name in ("base", "run"))
    cfg, lora, adapters, meta = load_adapters(run)
    assert lora == LORA
    whole = zj.load_model(base)
    first, digest = whole.params, params_digest(whole.params)
    assert meta["base"] == {"source": "runs/base", "digest": digest}
    assert flat(adapters).keys() == adapter_shapes(cfg, lora).keys()
    assert_params(adapters, state.params)
    assert all(x.any() for x in flat(adapters).values())  # b too has moved
    model, wanted = zj.load_model(run), merge(first, adapters, lora)
    assert_params(model.params, wanted)
    narrow = zj.load_model(run / "checkpoints" / "2", dtype="bfloat16").params
    assert_params(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))
    # What is saved of the merged model is a whole model, which needs no base.
    zj.save_model(model, tmp_path / "merged")
    shutil.rmtree(base)
    assert params_digest(zj.load_model(tmp_path / "merged").params) == params_digest(wanted)
    with pytest.raises(FileNotFoundError, match=r"run has adapters for .*base, .* put it back"):
        zj.load_model(run)
    first["final_norm"] = first["final_norm"].at[3].add(1e-3)  # pitfall 45
    zj.export_hf(*whole[:3], base)
    with pytest.raises(ValueError, match=f"run belongs to .*{digest}, but .*base has .*; restore"):
        zj.load_model(run)
    with pytest.raises(ValueError, match="holds no adapters of a run"):
        load_adapters(base)
    with pytest.raises(ValueError, match="holds no adapters but a whole model; use --format=hf"):
        load_adapters(tmp_path / "merged")


def test_a_preference_run_adapts_an_adapted_model(world, adapted, tmp_path):
    """Adapters on adapters: the second run's base is the first one, merged."""
    source, lora = adapted[0] / "runs" / "run", LoraConfig(3, 5.0, 0.1, ("k", "gate"))
    config = run_config(world, "dpo", source, lora)
    fit(with_fields(config, dpo={"reference": "adapter_off"}), tmp_path / "dpo")
    middle = zj.load_model(source).params
    _, lora, adapters, meta = load_adapters(tmp_path / "dpo")
    assert meta["base"]["digest"] == params_digest(middle)
    assert_params(zj.load_model(tmp_path / "dpo").params, merge(middle, adapters, lora))
    first = runs.metrics_of(tmp_path / "dpo")[0]
    assert (first["step"], first["split"]) == (0, "eval")
    assert abs(first["eval_loss"] - np.log(2)) < 1e-6


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    return save_base(world, quantized_config(world, "sft", folder, "nf4").model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("held", ["int8", "nf4"])
def test_a_quantized_run_trains_resumes_and_belongs_to_its_base(
    world, base, tmp_path, monkeypatch, held
):
    config = quantized_config(world, "sft", base, held)
    whole = fit(config, tmp_path / "whole")
    first, last = runs.metrics_of(tmp_path / "whole", "eval")
    assert last["eval_loss"] < first["eval_loss"] - 0.02
    cut = tmp_path / "cut"
    runs.assert_equal(whole, runs.killed_and_resumed(monkeypatch, config, cut, 5))
    # Adapters are merged with the full base, whose digest they name.
    _, lora, adapters, meta = load_adapters(cut)
    full = zj.load_model(base).params
    assert lora.base == meta["config"]["lora"]["base"] == held
    assert meta["base"]["digest"] == params_digest(full)
    assert_params(zj.load_model(cut).params, merge(full, adapters, lora))
    for other in {"full", "int8", "nf4"} - {held}:
        with pytest.raises(ValueError, match=f"lora.base was '{held}', is '{other}'"):
            fit(quantized_config(world, "sft", base, other), cut)
    save_base(world, config.model, tmp_path / "other", 4)
    with pytest.raises(ValueError, match="belongs to parameters of digest .* but .* has"):
        fit(quantized_config(world, "sft", tmp_path / "other", held), cut)


@pytest.mark.slow
def test_the_reference_is_the_base_as_it_is_held(world, base, tmp_path):
    digests, logps = [], []
    for mode, held in (("precomputed", "full"), ("precomputed", "nf4"), ("adapter_off", "nf4")):
        config = quantized_config(world, "dpo", base, held)
        config = with_fields(config, dpo={"reference": mode}, train={"max_steps": 1})
        fit(config, tmp_path / (mode + held))
        first = runs.metrics_of(tmp_path / (mode + held), "eval")[0]
        assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first["eval_rewards/ties"] == 1
        logps.append(first["eval_logps/chosen"])
        digests.append(load_adapters(tmp_path / (mode + held)).meta["reference_digest"])
    assert abs(logps[0] - logps[1]) > 0.1
    assert logps[1] == logps[2]
    assert digests[0] != digests[1]  # no file is shared
    assert digests[1] == digests[2]


def test_a_base_that_has_no_blocks_is_refused_before_it_is_loaded(world, tmp_path):
    config = quantized_config(world, "sft", tmp_path / "nowhere", "nf4")
    with pytest.raises(ValueError, match=r"axis H=10 of layers/attention/o .* lora.base=full"):
        fit(with_fields(config, model={"head_dim": 10}), tmp_path / "run")
