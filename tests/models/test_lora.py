"""Low-rank adapters: what they start as, compute, learn and become when merged."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_MESH
from flax import traverse_util

from zephyr_jax.config.run import PROJECTIONS, LoraConfig
from zephyr_jax.models.lora import (
    LoraContext,
    abstract_adapters,
    adapter_shapes,
    dropout_mask,
    init_adapters,
    merge,
    project,
)
from zephyr_jax.models.mistral import ForwardOptions, as_module
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import named_sharding, spec

ALL = LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=PROJECTIONS)
WET = dataclasses.replace(ALL, dropout=0.25)
REMATS = ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dots"))]


@pytest.fixture(autouse=True)
def _no_mesh():
    """Arrays of these tests are created without a mesh."""
    with jax.set_mesh(NO_MESH):
        yield


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def random_adapters(cfg, lora):
    """Neither matrix is zero."""
    out = {}
    for i, (path, shape) in enumerate(adapter_shapes(cfg, lora).items()):
        rng = np.random.default_rng(i)
        sd = 0.2 if path.endswith("a") else 0.1
        out[path] = rng.normal(0, sd, shape).astype(np.float32)
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(out, sep="/"))


def hidden(cfg, params, tokens, **options):
    """The hidden states under these options."""
    return as_module(cfg, params).hidden(tokens, options=ForwardOptions(**options))


def tokens_of(shape=(4, 11), seed=0):
    return np.random.default_rng(seed).integers(0, 104, shape).astype(np.int32)


def on_mesh(cfg, params, lora, adapters):
    """All of them, and tokens, on the ambient mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(cfg, lora))
    over = param_shardings(cfg), shardings, named_sharding(spec("BT"))
    return jax.device_put((*jax.device_get((params, adapters)), tokens_of()), over)


def outputs(cfg, lora, params, adapters, tokens, key=None, **options):
    """The hidden states, jitted, on the host."""

    def run(params, adapters, tokens, key):
        of_adapters = {"adapters": adapters, "lora": lora, "dropout_key": key}
        return hidden(cfg, params, tokens, **of_adapters, **options).astype(jnp.float32)

    return jax.device_get(jax.jit(run)(params, adapters, tokens, key))


def test_only_the_named_projections_have_adapters(cfg):
    lora = dataclasses.replace(ALL, targets=("o", "down", "q"))
    assert {k: x.shape for k, x in flat(init_adapters(cfg, lora, jax.random.key(0))).items()} == {
        "layers/attention/q/a": (3, 48, 3),
        "layers/attention/q/b": (3, 3, 4, 2, 10),
        "layers/attention/o/a": (3, 4, 2, 10, 3),
        "layers/attention/o/b": (3, 3, 48),
        "layers/mlp/down/a": (3, 72, 3),
        "layers/mlp/down/b": (3, 3, 48),
    }


def test_an_adapter_begins_within_its_bound(cfg):
    cfg = dataclasses.replace(cfg, num_hidden_layers=7)
    got = flat(init_adapters(cfg, dataclasses.replace(ALL, rank=32), jax.random.key(0)))
    inputs = {"o": 80, "down": 72}
    for path, x in got.items():
        name, part = path.split("/")[-2:]
        if part == "b":
            assert not x.any()
            continue
        bound = inputs.get(name, 48) ** -0.5
        assert 0.99 * bound < np.abs(x).max() <= bound
        assert abs(x.std() - bound / 3**0.5) < 0.02 * bound
        assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.1
    q, k = got["layers/attention/q/a"], got["layers/attention/k/a"]
    assert abs(np.corrcoef(q.ravel(), k.ravel())[0, 1]) < 0.05


@pytest.mark.usefixtures("sharded_mesh")
def test_adapters_are_created_the_same_on_every_mesh(cfg):
    got = init_adapters(cfg, ALL, jax.random.key(0))
    shape_of = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(shape_of, got) == jax.tree.map(shape_of, abstract_adapters(cfg, ALL))
    with jax.set_mesh(NO_MESH):
        wanted = flat(init_adapters(cfg, ALL, jax.random.key(0)))
    for path, x in flat(got).items():
        np.testing.assert_array_equal(x, wanted[path], path)


def test_new_adapters_change_no_bit(cfg, params):
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    new, tokens = init_adapters(cfg, ALL, jax.random.key(0)), tokens_of()
    base = outputs(cfg, None, params, None, tokens)
    np.testing.assert_array_equal(outputs(cfg, ALL, params, new, tokens), base)


def test_a_merge_adds_the_product_and_nothing_else(cfg, params):
    lora = dataclasses.replace(ALL, targets=("q", "o"))
    adapters = random_adapters(cfg, lora)
    got, matrices = flat(merge(params, adapters, lora)), flat(adapters)
    for path, x in flat(params).items():
        if path in ("layers/attention/q", "layers/attention/o"):
            a, b = (matrices[f"{path}/{part}"].astype(np.float64) for part in "ab")
            x = x + 7 / 3 * np.stack([np.tensordot(*pair, 1) for pair in zip(a, b, strict=True)])
            np.testing.assert_allclose(got[path], x, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(got[path], x)


@pytest.mark.usefixtures("sharded_mesh")
def test_adapters_compute_the_same_on_every_mesh(cfg, params):
    with jax.set_mesh(NO_MESH):
        adapters = random_adapters(cfg, WET)
        wet = outputs(cfg, WET, params, adapters, tokens_of(), jax.random.key(3))
        alone = flat(merge(params, adapters, WET))
    params, adapters, tokens = on_mesh(cfg, params, WET, adapters)
    got = outputs(cfg, WET, params, adapters, tokens, jax.random.key(3), remat="full")
    np.testing.assert_allclose(got, wet, rtol=0, atol=1e-5)
    merged = jax.jit(functools.partial(merge, lora=WET))(params, adapters)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert a.sharding == b.sharding
    for path, x in flat(merged).items():
        np.testing.assert_allclose(x, alone[path], rtol=0, atol=1e-6, err_msg=path)


def assert_same(got, wanted, tolerance):
    """Hidden states and adapters' gradients, relative to the largest entry of each array."""
    got, wanted = ({"states": states, **grads} for states, grads in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, x in wanted.items():
        assert np.abs(x).max() > 1e-2
        close = tolerance * np.abs(x).max()
        np.testing.assert_allclose(got[path], x, rtol=0, atol=close, err_msg=path)


def computed(cfg, base, adapters, tokens, remat="none", *, merged=False):
    """Hidden states, and the adapters' gradients of a sum of them with random signs."""
    signs = np.random.default_rng(9).normal(size=(*tokens.shape, cfg.hidden_size))

    def total(adapters, base, tokens):
        options = {} if merged else {"adapters": adapters, "lora": ALL, "remat": remat}
        base = merge(base, adapters, ALL) if merged else base
        states = hidden(cfg, base, tokens, **options)
        return (states.astype(jnp.float32) * signs.astype(np.float32)).sum(), states

    grads, states = jax.jit(jax.grad(total, has_aux=True))(adapters, base, tokens)
    return np.asarray(jax.device_get(states), np.float32), flat(grads)


@pytest.mark.parametrize("remat", REMATS)
def test_adapters_compute_and_learn_what_the_merged_parameters_do(cfg, params, remat):
    adapters, tokens = random_adapters(cfg, ALL), tokens_of()
    got = computed(cfg, params, adapters, tokens, remat)
    assert_same(got, computed(cfg, params, adapters, tokens, merged=True), 2e-5)


def projected(x, weight, a, b, scale, dropout=0.0, key=None):
    """The gate's projection of `x` with an adapter of these matrices and this scale."""
    lora = LoraConfig(rank=2, alpha=2 * scale, dropout=dropout, targets=("gate",))
    context = LoraContext({"mlp": {"gate": {"a": a, "b": b}}}, key, lora)
    return project("gate", "BTD,DF->BTF", x, weight, "float32", context)


def test_gradients_are_float32_sums_of_narrow_products():
    """In bfloat16 the gradient of an adapter is that of a float32 sum over all tokens."""
    x, weight = jnp.ones((4, 512, 48), jnp.bfloat16), jnp.zeros((48, 72))

    def total(a, b):
        return projected(x, weight, a, b, 1.0).astype(jnp.float32).sum()

    da, db = jax.grad(total, (0, 1))(jnp.full((48, 3), 2.0**-6), jnp.full((3, 72), 2.0**-6))
    assert da.dtype == db.dtype == jnp.float32
    np.testing.assert_array_equal(da, np.full((48, 3), 4 * 512 * 72 * 2.0**-6))
    np.testing.assert_array_equal(db, np.full((3, 72), 4 * 512 * 48 * 2.0**-6))


def test_dropout_is_off_without_a_key_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    shapes = (2, 3, 8), (8, 5), (8, 2), (2, 5)
    x, weight, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    out = jax.jit(lambda key: projected(x, weight, a, b, 0.5, 0.25, key))
    dry = out(None)
    np.testing.assert_allclose(dry, x @ weight + 0.5 * (x @ a) @ b, rtol=0, atol=1e-5)
    many = jax.vmap(out)(jax.random.split(jax.random.key(0), 4000))
    error = np.asarray(many.std(0) / 4000**0.5)
    assert (error > 0).all()
    assert (np.abs(many.mean(0) - dry) < 5 * error).all()
    # An entry is dropped as a whole, a quarter of them; only what the adapter reads is touched.
    eye, ones = jnp.eye(8), jnp.ones((50, 20, 8))
    kept = projected(ones, jnp.zeros((8, 8)), eye, eye, 1.0, 0.25, jax.random.key(5))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert abs((np.asarray(kept) == 0).mean() - 0.25) < 0.02


def test_every_projection_layer_and_key_drops_otherwise(cfg, params, monkeypatch):
    from zephyr_jax.models import lora as module

    masks, draw = [], module.dropout_mask

    def noted(*arguments):
        mask = draw(*arguments)
        jax.debug.callback(lambda x: masks.append(np.asarray(x)), mask)
        return mask

    monkeypatch.setattr(module, "dropout_mask", noted)
    targets = dataclasses.replace(WET, targets=("q", "k", "v", "gate", "up"))  # all read B T D
    adapters = random_adapters(cfg, targets)
    of_adapters = {"adapters": adapters, "lora": targets}
    run = jax.jit(lambda key: hidden(cfg, params, tokens_of(), dropout_key=key, **of_adapters))
    for seed in (0, 1):
        run(jax.random.key(seed))
    jax.effects_barrier()
    assert len({mask.tobytes() for mask in masks}) == len(masks) == 2 * 3 * 5


def test_masks_are_as_independent_as_coins():
    """Means, and products of neighbors and of masks of other keys, are within chance's 4.5 sd."""
    shape, keep = (3, 40, 2, 3, 70), 0.7
    keys = jax.random.split(jax.random.key(7), 24)
    masks = np.stack([dropout_mask(key, keep, shape, "BTKGH") for key in keys])
    coins = ((masks - keep) / np.sqrt(keep * (1 - keep))).reshape(len(keys), -1)
    n = coins.shape[1]
    assert np.abs(coins.sum(axis=1)).max() < 4.5 * n**0.5
    between = coins @ coins.T - np.diag(np.square(coins).sum(axis=1))
    assert np.abs(between).max() < 4.5 * n**0.5
    for shift in (1, 2, 3, 4, 8, 16, 64, 70, 128, 210, 256, 420, 1024, 4096, 16800):
        products = (coins[:, shift:] * coins[:, :-shift]).sum(axis=1)
        assert np.abs(products).max() < 4.5 * (n - shift) ** 0.5, shift
    assert dropout_mask(keys[0], 1 - 1e-12, shape, "BTKGH").all()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_a_frozen_base_has_no_gradient(cfg, params, remat):
    """No product of the compiled step has the shape of a parameter; with all trained they do."""
    adapters = random_adapters(cfg, ALL)

    def loss(params, adapters):
        states = hidden(cfg, params, tokens_of(), adapters=adapters, lora=ALL, remat=remat)
        return jnp.square(states).mean()

    def products(argument):
        text = jax.jit(jax.grad(loss, argument)).lower(params, adapters).compile().as_text()
        return re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)

    def dense(argument):
        shapes = [list(map(int, shape.split(","))) for shape in products(argument)]
        return sum(np.prod(shape) in (48 * 72, 48 * 80, 48 * 40) for shape in shapes)

    assert dense(0) >= 7
    assert dense(1) == 0
