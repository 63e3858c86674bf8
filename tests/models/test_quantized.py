"""Quantized projections: codes and scales against float64, and the model that computes by them."""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_MESH
from jax.sharding import AbstractMesh, AxisType
from test_configs import abstract_run
from test_lora import ALL, assert_same, computed, hidden, on_mesh, random_adapters, tokens_of

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.models import lora
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.sharding import axis_size

# Logical axes, sizes, the blocked axis from the front, values in a block.
LAYOUTS = [
    ("D F", (192, 5), 0, 64),
    ("L D K G H", (2, 96, 3, 5, 7), 1, 32),
    ("L D K H", (3, 64, 2, 5), 1, 64),
    ("L F D", (3, 112, 7), 1, 16),
    ("L K G H D", (2, 3, 5, 48, 9), 3, 16),
]
KINDS = ["int8", "nf4"]
# Every axis different, blocks of 64, 64 and 16 that two devices divide.
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 48, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cfg():
    return dataclasses.replace(zj.MistralConfig.tiny(), **SIZES)


@pytest.fixture(autouse=True)
def _no_mesh():
    with jax.set_mesh(NO_MESH):
        yield


@pytest.fixture(scope="module")
def params(cfg):
    return jax.device_get(zj.init_params(cfg, jax.random.key(0)))


def weights(shape, axis, block):
    """Random ones of several magnitudes; a block of zeros, and one with a single huge value."""
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    x *= np.exp(np.random.default_rng(4).normal(size=shape[-1])).astype(np.float32)
    blocks = np.moveaxis(x, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, block)
    first, last = (tuple(n - 1 for n in blocks.shape[:-1]), (0,) * (blocks.ndim - 1))
    blocks[first] = 0
    blocks[last] = np.abs(blocks[last]) * 1e-3
    blocks[last][5] = 1e8
    return np.moveaxis(blocks.reshape(*blocks.shape[:-2], shape[axis]), -1, axis)


def blocks_of(x, axis, block):
    """An array with its blocks last, float64: `... N block`."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    return x.reshape(*x.shape[:-1], -1, block)


def stored(q, axis):
    """Codes `... N block` and scales `... N` as they are stored, unpacked by other means."""
    codes, scales = (np.moveaxis(np.asarray(x), axis + 1, -1) for x in (q.codes, q.scales))
    codes, scales = (np.moveaxis(x, axis, -2) for x in (codes, scales))
    if codes.dtype == np.uint8:
        codes = np.concatenate([codes % 16, codes // 16], axis=-1)
    return codes.astype(int), scales[..., 0].astype(np.float64)


def test_the_codebook_is_the_quantiles_of_a_normal_distribution():
    """Seven below zero, zero and eight above it; the outermost as in the paper."""
    last = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    below = [-quantile(last + i / 7 * (0.5 - last)) / quantile(last) for i in range(7)]
    above = [quantile(last + i / 8 * (0.5 - last)) / quantile(last) for i in range(8)]
    np.testing.assert_allclose(lora.NF4, [*below, 0.0, *above[::-1]], rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("axes", "shape", "axis", "block"), LAYOUTS)
def test_codes_and_scales_equal_float64(kind, axes, shape, axis, block):
    x, nf4 = weights(shape, axis, block), kind == "nf4"
    q = lora.quantize(x, axes, kind)
    codes, scales = stored(q, axis)
    wide = blocks_of(x, axis, block)
    assert (q.codes.dtype, q.scales.dtype) == ("uint8" if nf4 else "int8", "float32")
    assert codes.shape == wide.shape
    np.testing.assert_allclose(scales, np.abs(wide).max(-1) / (1 if nf4 else 127), rtol=1e-6)
    values, index = (np.array(lora.NF4), codes) if nf4 else (np.arange(-127.0, 128), codes + 127)
    # The nearest value of all; at the middle of two either is.
    far = np.abs(wide[..., None] / np.where(scales > 0, scales, 1)[..., None, None] - values)
    distance = np.take_along_axis(far, index[..., None], -1)[..., 0]
    assert (distance - far.min(-1)).max() <= 1e-6 * values.max()
    back = blocks_of(lora.dequantize(q, "float32"), axis, block)
    np.testing.assert_allclose(back, values[index] * scales[..., None], rtol=1e-6)
    narrow = lora.dequantize(q, "float32").astype(jnp.bfloat16)  # rounded once
    np.testing.assert_array_equal(lora.dequantize(q, "bfloat16"), narrow)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_bits_of_a_value(kind, bits):
    shapes = abstract_params(load_config("zephyr_7b_sft_qlora").model)
    base = jax.eval_shape(lambda params: lora.freeze(params, kind, "bfloat16"), shapes)
    held, values = 0, 0
    for name in ("attention", "mlp"):
        held += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base["layers"][name]))
        values += sum(x.size for x in jax.tree.leaves(shapes["layers"][name]))
    assert 8 * held == bits * values
    assert base["embed"].dtype == base["layers"]["mlp_norm"].dtype == jnp.bfloat16
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
    assert round(whole / 1e9, 2) == {"int8": 7.94, "nf4": 4.45}[kind]  # float32: 28.97


def test_blocks_that_do_not_fit_are_refused(cfg):
    lora.check_blocks(cfg)
    with pytest.raises(ValueError, match=r"H=10 of layers/attention/o has 5 blocks of 2 .* lora"):
        lora.check_blocks(dataclasses.replace(cfg, head_dim=10))
    mesh = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"D=128 of layers/attention/q has 2 blocks of 64 .*fsdp=4"),
    ):
        lora.check_blocks(cfg)


def plain(base):
    """The parameters that a quantized base stands for."""
    return jax.tree.map(
        lambda x: lora.dequantize(x, "float32") if isinstance(x, lora.Quantized) else x,
        base,
        is_leaf=lambda x: isinstance(x, lora.Quantized),
    )


@pytest.mark.parametrize(
    ("kind", "remat"),
    [("int8", "full")]
    + [pytest.param("nf4", remat, marks=pytest.mark.slow) for remat in ("none", "dots", "full")],
)
def test_the_model_is_that_of_the_dequantized_weights(cfg, params, kind, remat):
    base = lora.freeze(jax.tree.map(jnp.asarray, params), kind, cfg.dtype)
    adapters = random_adapters(cfg, ALL)
    got = computed(cfg, base, adapters, tokens_of(), remat)
    assert_same(got, computed(cfg, plain(base), adapters, tokens_of()), 1e-5)
    full = computed(cfg, params, adapters, tokens_of())
    assert np.abs(got[0] - full[0]).max() > 1e-2  # it is another function than the full base's


@pytest.mark.slow
@pytest.mark.usefixtures("sharded_mesh")
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_the_same_on_every_mesh(cfg, params, kind):
    with jax.set_mesh(NO_MESH):
        adapters = random_adapters(cfg, ALL)
        whole = lora.freeze(jax.tree.map(jnp.asarray, params), kind, cfg.dtype)
        wanted = computed(cfg, whole, adapters, tokens_of(), "full")
    params, adapters, tokens = on_mesh(cfg, params, ALL, adapters)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    base = lora.freeze(params, kind, cfg.dtype)
    assert not params
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
    for leaf in jax.tree.leaves(base["layers"]):
        if leaf.ndim > 2:  # not a norm
            assert leaf.addressable_data(0).size * axis_size("fsdp", "tensor") == leaf.size
    for x, sharding in zip(jax.tree.leaves(plain(base)), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_same(computed(cfg, base, adapters, tokens, "full"), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_never_more_than_a_layer_is_there_in_full(cfg, remat):
    """A step's temporary memory grows by far less than a layer's weights with every layer."""

    def held(n_layers):
        deep = dataclasses.replace(cfg, num_hidden_layers=n_layers)
        base = jax.eval_shape(lambda p: lora.freeze(p, "nf4", cfg.dtype), abstract_params(deep))
        adapters = lora.abstract_adapters(deep, ALL)

        def total(adapters, base):
            states = hidden(deep, base, tokens_of((1, 4)), adapters=adapters, lora=ALL, remat=remat)
            return jnp.square(states).sum()

        compiled = jax.jit(jax.grad(total)).lower(adapters, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 4 * (2 * 128 * 288 + 2 * 128 * 96 + 3 * 128 * 256)
    assert (held(12) - held(4)) / 8 < 0.25 * layer


def test_the_7b_step_type_checks_for_256_chips():
    config = load_config("zephyr_7b_sft_qlora")
    mesh = AbstractMesh((4, 16, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        step, state, batch, base = abstract_run(config, rows=256)
        after, _ = jax.eval_shape(step, state, batch, base)
    gate = base["layers"]["mlp"]["gate"]
    assert gate.codes.sharding.spec == jax.P(None, "fsdp", None, "tensor")
    assert (gate.codes.shape, gate.scales.shape) == ((32, 64, 32, 14336), (32, 64, 1, 14336))
    over = [jax.tree.map(lambda x: x.sharding, tree) for tree in (after.params, state.params)]
    assert over[0] == over[1]
