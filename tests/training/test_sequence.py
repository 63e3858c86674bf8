"""Tokens divided over devices, in the residual stream and over context, change no number."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, with_fields
from jax.sharding import AbstractMesh, AxisType
from test_configs import abstract_step
from test_lora import WET, random_adapters
from test_steps import pairs, preference_batch  # noqa: F401

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.models.lora import abstract_adapters, freeze
from zephyr_jax.models.mistral import as_module, segment_positions
from zephyr_jax.models.parameters import abstract_params, param_shardings
from zephyr_jax.sharding import make_mesh, named_sharding, spec
from zephyr_jax.training.scores import StepInputs
from zephyr_jax.training.steps import loss_sums
from zephyr_jax.types import Rows

AXES = ("data", "fsdp", "tensor", "context")
SIZES = [(1, 2, 4, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8), (2, 1, 1, 4)]
BOUND = 1e-5  # of a gradient's largest value; measured up to 3e-6


@pytest.fixture(scope="module")
def wide(cfg):
    """Every dimension different, heads that eight devices can share, a window of five."""
    return dataclasses.replace(cfg, num_attention_heads=16, num_key_value_heads=8)


@pytest.fixture(scope="module")
def wide_params(wide):
    return jax.device_get(random_params(wide))


def packed_rows(length=24):
    """Four rows of one to three dialogues, and padding behind most; a third is no target."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 104, (4, length)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, tokens.shape), axis=1).astype(np.int32)
    segments[1], segments[2, 20:], segments[3, 5:] = 1, 0, 0
    mask = (rng.random(tokens.shape) < 0.6) & (segments > 0)
    positions = np.asarray(segment_positions(segments))
    return Rows(tokens, segments, positions, np.zeros_like(tokens), mask)


def place(x):
    """An array of a batch on the ambient mesh."""
    return jax.device_put(x, named_sharding(spec("BTSG"[: x.ndim])))


def sft(cfg, **options):
    return with_fields(load_config("demo_sft"), model=cfg, train=options)


def value_and_grads(config, params, batch, given=None):
    """The loss sum and its gradients, on the host."""
    run = jax.jit(jax.value_and_grad(lambda *x: loss_sums(config)(*x)[0]))
    return jax.device_get(run(params, batch, *([] if given is None else [given])))


def assert_same_grads(got, want, bound=BOUND):
    np.testing.assert_allclose(got[0], want[0], rtol=bound)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * float(np.abs(b).max()))


@pytest.fixture(scope="module")
def on_one_device(wide, wide_params):
    return value_and_grads(sft(wide), wide_params, packed_rows())


def on_mesh(sizes, config, params, batch):
    with jax.set_mesh(make_mesh(*sizes)):
        placed = jax.device_put(params, param_shardings(config.model))
        return value_and_grads(config, placed, jax.tree.map(place, batch))


@pytest.mark.parametrize(
    ("sizes", "attention", "remat"),
    [((1, 2, 2, 2), "einsum", "full"), ((2, 1, 1, 4), "tiled", ("q",))],
    ids=str,
)
def test_a_mesh_gives_the_gradients_of_one_device(
    wide, wide_params, on_one_device, sizes, attention, remat
):
    config = sft(wide, attention=attention, remat=remat)
    assert_same_grads(on_mesh(sizes, config, wide_params, packed_rows()), on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["einsum", "tiled", "splash"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_kernel_gives_the_gradients_of_one_device(
    wide, wide_params, on_one_device, sizes, attention
):
    config = sft(wide, attention=attention, remat="full")
    assert_same_grads(on_mesh(sizes, config, wide_params, packed_rows()), on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [*SIZES[:3], (1, 1, 2, 4)], ids=str)
def test_pairs_give_the_gradients_of_one_device(
    wide,
    sizes,
    tied,
    preference_batch,  # noqa: F811
):
    cfg = dataclasses.replace(wide, tie_word_embeddings=tied)
    params, batch = jax.device_get((random_params(cfg), preference_batch))
    config = dataclasses.replace(load_config("demo_dpo"), model=cfg)
    want = value_and_grads(config, params, batch)
    assert_same_grads(on_mesh(sizes, config, params, batch), want)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[2], (1, 1, 2, 4)], ids=str)
def test_adapters_get_the_gradients_of_one_device(wide, sizes, base):
    sizes_of = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 16}
    cfg = dataclasses.replace(wide, **sizes_of, initializer_range=0.05)
    lora = dataclasses.replace(WET, base=base)
    config = dataclasses.replace(sft(cfg), lora=lora, init="x")
    params = random_params(cfg)
    adapters, params, key = jax.device_get(random_adapters(cfg, lora)), jax.device_get(params), 7
    adapters = jax.tree.map(lambda x: 0.3 * x, adapters)  # wider than theirs, as large in effect

    def run(adapters, params, rows):
        frozen = freeze(params, base, cfg.dtype)
        return value_and_grads(config, adapters, rows, StepInputs(frozen, jax.random.key(key)))

    want = run(adapters, dict(jax.tree.map(jnp.asarray, params)), packed_rows())
    with jax.set_mesh(make_mesh(*sizes)):
        over = jax.tree.map(lambda x: x.sharding, abstract_adapters(cfg, lora))
        placed = jax.device_put(adapters, over), jax.device_put(params, param_shardings(cfg))
        got = run(*placed, jax.tree.map(place, packed_rows()))
    assert_same_grads(got, want)


def stream_of(cfg, params, tokens):
    """The divisions of the residual stream: where it enters a layer, where it leaves the last."""
    trace = jax.make_jaxpr(lambda p, t: as_module(cfg, p).hidden(t))(params, tokens)
    (loop,) = (e for e in trace.eqns if e.primitive.name == "scan")
    (carried,) = {str(x.aval.sharding.spec) for x in loop.outvars}
    return carried, str(trace.out_avals[0].sharding.spec)


@pytest.mark.parametrize(
    ("sizes", "length", "divided"),
    [
        ((1, 2, 4, 1), 24, "tensor"), ((1, 2, 4, 1), 22, None),
        ((1, 2, 2, 2), 24, ("context", "tensor")), ((1, 1, 2, 4), 20, "context"),
        ((1, 1, 1, 8), 24, "context"), ((2, 4, 1, 1), 24, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_residual_stream_is_divided(wide, wide_params, sizes, length, divided):
    tokens = packed_rows(length).tokens
    tokens = np.concatenate([tokens, tokens])
    with jax.set_mesh(make_mesh(*sizes)):
        found = stream_of(wide, jax.device_put(wide_params, param_shardings(wide)), place(tokens))
    assert found == (str(jax.P(("data", "fsdp"), divided, None)),) * 2


def test_what_context_does_not_divide_is_refused(wide, cfg, wide_params):
    with pytest.raises(ValueError, match="data.seq_len=2048 must be divisible by mesh.context=3"):
        load_config("zephyr_7b_sft", ["--config.mesh.context=3"])
    with jax.set_mesh(make_mesh(context=8)):
        params = jax.device_put(wide_params, param_shardings(wide))
        with pytest.raises(ValueError, match="rows of 20 tokens .* divisible by mesh.context=8"):
            jax.eval_shape(partial(zj.forward, wide), params, place(packed_rows(20).tokens))
        with pytest.raises(ValueError, match="num_key_value_heads=4 is not .* = 8, over which"):
            jax.eval_shape(
                partial(zj.forward, cfg), abstract_params(cfg), place(packed_rows().tokens)
            )


@pytest.mark.parametrize("sizes", [(2, 4, 1, 8), (1, 16, 2, 4)], ids=str)
def test_the_7b_step_type_checks_for_rows_of_32768_tokens(sizes):
    config = with_fields(load_config("zephyr_7b_sft"), data={"seq_len": 32768})
    with jax.sharding.use_abstract_mesh(
        AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 4)
    ):
        state, info = abstract_step(config, rows=32)
    assert info["loss"].dtype == jnp.float32
    up = state.params["layers"]["mlp"]["up"]
    assert np.prod(up.sharding.shard_shape(up.shape)) * np.prod(sizes[1:]) == np.prod(up.shape)
