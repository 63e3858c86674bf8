"""Every kind of config traces, and every one of its fields is read."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config.run import LoraConfig, MistralConfig, RunConfig, load_config
from zephyr_jax.sharding import AXES, platform
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import abstract_base, abstract_batch, abstract_state, jitted_steps


def abstract_run(config: RunConfig, rows: int):
    """One jitted training step, and shapes of its inputs under the ambient mesh."""
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 100))
    state = abstract_state(config, optimizer)
    batch = abstract_batch(rows, config.data.seq_len, 7 if config.dpo else None)
    base = abstract_base(config.model, config.lora) if config.lora else None
    return jitted_steps(config, optimizer)[0], state, batch, base


def abstract_step(config: RunConfig, rows: int):
    """The output shapes of one training step under the ambient mesh; nothing is computed."""
    return jax.eval_shape(*abstract_run(config, rows))


KINDS = ("demo_sft", "demo_dpo", "real_small_sft", "zephyr_7b_handbook_v020_dpo")


@pytest.mark.parametrize("name", [*KINDS, "zephyr_7b_dpo_qlora"])
def test_every_kind_of_config_traces(name):
    config = load_config(name)
    state, info = abstract_step(config, rows=8)
    if config.lora is None:
        assert state.params["embed"].shape == (config.model.vocab_size, config.model.hidden_size)
    assert info["loss"].dtype == jnp.float32


TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


@pytest.mark.parametrize(
    ("name", "sizes", "device"),  # with a device by its kernel for attention
    [
        ("zephyr_7b_sft", (1, 256, 1), None),
        ("zephyr_7b_dpo", (2, 16, 8), TPU),
        pytest.param("zephyr_7b_dpo", (4, 64, 1), None, marks=pytest.mark.slow),
        pytest.param("zephyr_7b_sft", (2, 16, 8), TPU, marks=pytest.mark.slow),
    ],
)
def test_the_7b_step_type_checks_for_256_chips(name, sizes, device):
    config, explicit = load_config(name), (AxisType.Explicit,) * 3
    mesh = AbstractMesh(sizes, AXES, axis_types=explicit, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert (platform(), config.train.attention) == ("tpu" if device else "cpu", "auto")
        state, _ = abstract_step(config, rows=256)
    assert state.params["layers"]["mlp"]["up"].sharding.spec == jax.P(None, "fsdp", "tensor")
    per_device = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        shard = leaf.sharding.shard_shape(leaf.shape)
        per_device += int(np.prod(shard)) * leaf.dtype.itemsize
    # parameters and both moments, float32, over fsdp x tensor devices
    assert per_device < 1.02 * 12 * zj.count_params(config.model) / (sizes[1] * sizes[2])


def test_what_is_no_config_is_refused():
    with pytest.raises(FileNotFoundError, match="no config file nowhere.py"):
        load_config("nowhere.py")
    with pytest.raises(ValueError, match="get_config"):
        load_config(__file__)
    with pytest.raises(ValueError, match="'--config.optim.peak_lr' is not --config.FIELD=VALUE"):
        load_config("demo_sft", ["--config.optim.peak_lr", "1", "5e-7"])
    good = load_config("demo_dpo").to_dict()
    del good["optim"]["betas"]
    with pytest.raises(ValueError, match=r"config.optim \(OptimConfig\) lacks betas; add"):
        RunConfig.from_config_dict(good)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1e-4", "config.optim.lr: no such field; did you mean peak_lr?"),
        ("lr=1e-4", "config.lr: no such field; did you mean config.optim.peak_lr?"),
        ("train.beta=1", "config.train.beta: no such field; did you mean config.dpo.beta?"),
        ("optim.warmup_steps=9", "did you mean warmup_ratio?"),
        ("lroa.rank=8", "config.lroa: no such field; did you mean lora?"),
        ("train.lora.rank=8", "config.train.lora: no such field; did you mean config.lora?"),
        ("train.save_steps=9", "did you mean checkpoint_every?"),
        ("train.early_stopping=3", "did you mean keep_best?"),
        ("dpo.wpo=True", "did you mean config.dpo.options.wpo?"),
        ("mesh.zzz=1", "config.mesh.zzz: no such field; it has data, fsdp, tensor, context"),
        ("train.ephochs=8", "config.train.ephochs: no such field; did you mean epochs?"),
        ("lora.rank=8", "config.lora (LoraConfig) lacks alpha; add config.lora.alpha = ... to"),
        ("dpo.beta=0.1", "lacks reference, max_length, max_prompt_length; add"),
    ],
)
def test_a_mistyped_field_is_answered_with_the_one_that_may_be_meant(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("zephyr_7b_sft", [f"--config.{word}"])


def test_a_section_that_a_recipe_lacks_can_be_added_on_the_command_line():
    lora = load_config("zephyr_7b_sft", ["--config.lora.rank=8", "--config.lora.alpha=16"]).lora
    assert lora == LoraConfig(8, 16.0, 0.0, ("q", "k", "v", "o", "gate", "up", "down"), "full")
    lengths = ("beta=0.1", "reference=none", "max_length=64", "max_prompt_length=32")
    dpo = load_config("demo_sft", [f"--config.dpo.{word}" for word in lengths]).dpo
    assert (dpo.beta, dpo.reference, dpo.loss) == (0.1, "none", "sigmoid")
    assert load_config("zephyr_7b_sft_lora", ["--config.lora=None"]).lora is None


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--config=zephyr_sft"], ["did you mean zephyr_7b_sft or", "demo_sft  .*SFT of the em"]),
        (["--config=demo_sft", "--lora.rank=8"], ["did you mean --config.lora.rank=8?"]),
        (["--config=demo_sft", "--config.seed", "8"], ["write --config.seed=VALUE, with ="]),
    ],
)
def test_a_mistyped_command_is_answered_with_what_may_be_meant(words, lines, capsys):
    with pytest.raises(SystemExit):
        main(["train", *words])
    shown = capsys.readouterr().err
    for line in lines:
        assert re.search(line, shown), shown


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("lora.targets=('v', 'q')", "lora.targets", ("q", "v")),
        ("lora.targets=q", "lora.targets", ("q",)),
        ("train.remat=('q', 'k')", "train.remat", ("q", "k")),
        ("train.profile=(10, 13)", "train.profile", (10, 13)),
        ("train.trackers=('wandb', 'trackio')", "train.trackers", ("wandb", "trackio")),
        ("dpo.loss={'sigmoid': 1, 'sft': 0.2}", "dpo.loss", {"sigmoid": 1.0, "sft": 0.2}),
        ("dpo.loss=ipo", "dpo.loss", "ipo"),
        ("data.dataset={'messages/own': 0.5}", "data.dataset", {"messages/own": 0.5}),
        ("optim.offload_optimizer=true", "optim.offload_optimizer", True),
        ("model.sliding_window=None", "model.sliding_window", None),
        ("model.sliding_window=64", "model.sliding_window", 64),
        ("optim.peak_lr=5e-7", "optim.peak_lr", 5e-7),
        ("data.tokenizer=2024", "data.tokenizer", "2024"),
        ("dpo.options.ld_alpha=0.9", "dpo.options", {"ld_alpha": 0.9}),
        ("dpo.options={'ld_alpha': 1}", "dpo.options", {"ld_alpha": 1.0}),
        ("dpo.divergence=0.3", "dpo.divergence", 0.3),
    ],
)
def test_every_kind_of_value_can_be_set_from_the_command_line_and_survives_json(word, path, value):
    config = load_config("zephyr_7b_dpo_lora", [f"--config.{word}"])
    section, name = path.split(".")
    assert getattr(getattr(config, section), name) == value
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.targets=q, k", "lora.targets='q, k' is not known; use some of q, k, v"),
        ("lora.targets=()", "lora.targets=.. must be some of q, k"),
        ("lora.targets=(1, 2)", "config.lora.targets=1 must be of type str"),
        ("train.remat=some", "train.remat='some' is not known"),
        ("train.profile=(10,)", r"train.profile=\(10,\) must be \(FIRST, STOP\)"),
        ("train.trackers=mlflow", "train.trackers='mlflow' is not known"),
        ("dpo.loss={'sigmoid': 0}", "dpo.loss: weight 0.0 of sigmoid must be a number above 0"),
        ("dpo.loss={'sigmoid': 'x'}", "config.dpo.loss.sigmoid='x' must be of type float"),
        ("dpo.loss=3", "config.dpo.loss=3 must be of type str or dict"),
        ("data.dataset={}", "data.dataset={} is empty"),
        ("train.attention=flash", "train.attention='flash' is not known; use one of auto, "),
        ("optim.schedule=step", "use one of cosine, linear"),
        ("optim.schedule={'wsd': 0.1, 'cosine': 1}", "a name, or {'wsd': SHARE <= 1} alone"),
        ("train.keep_best={'loss': 3, 'kl': 2}", "{'METRIC': EVALUATIONS} of one metric"),
        ("train.bad_steps.skp=1", "train.bad_steps='skp' is not known; use one of skip, spike"),
        ("train.bad_steps.skip=2.5", "train.bad_steps.skip=2.5 must be above 0, and whole"),
        (f"optim.peak_lr={'9' * 400}", "config.optim.peak_lr=9+ must be of type float"),
        ("seed=4294967296", r"seed=4294967296 must be 0 or more, and below 2\^32"),
        ("data.splits=('a','a')", r"data.splits=\('a', 'a'\) must be \(TRAINING, HELD_OUT\)"),
        (f"seed={'-' * 3000}1", "config.seed='-+1' must be of type int"),
        ("optim.peak_lr=nan", "peak_lr=nan must be positive and finite"),
        ("model.bos_token_id=-1", "bos_token_id=-1 must be ids below vocab_size=32000"),
        ("model.max_position_embeddings=0", "max_position_embeddings=0 must be positive"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        load_config("zephyr_7b_dpo_lora", [f"--config.{word}"])


HF = {"model_type": "mistral", "hidden_size": 48, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("fields", "theta", "window"),
    [
        ({}, 10_000.0, 4096),  # v0.1 by transformers' defaults
        ({"rope_theta": 10_000.0, "sliding_window": 4096}, 10_000.0, 4096),
        ({"rope_theta": 1_000_000, "sliding_window": None}, 1e6, None),  # v0.2 and later
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, 4096),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6}, 1e6, 4096),
        ({"model_type": "llama", "rope_theta": 5e5, "sliding_window": 4096}, 5e5, None),
    ],
)
def test_theta_and_window_are_those_of_config_json(fields, theta, window):  # pitfall 33
    config = MistralConfig.from_hf(HF | fields)
    assert (config.rope_theta, config.sliding_window) == (theta, window)
    with pytest.raises(ValueError, match="two values of rope_theta"):
        MistralConfig.from_hf(HF | {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}})
