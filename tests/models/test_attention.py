"""Every implementation of attention against float64, forward and backward, and inside the model."""

import dataclasses
import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_pair, stack_rows

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.models import attention as module
from zephyr_jax.models import tiled
from zephyr_jax.models.attention import platform
from zephyr_jax.models.cache import init_cache
from zephyr_jax.models.masks import cache_layout, row_layout, visible
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.training.steps import loss_sums
from zephyr_jax.types import PreferenceBatch

# The kernel compiles for ten seconds and more where every step of it is ordinary JAX.
SLOW_SPLASH = pytest.param("splash", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that short rows have many of them."""
    monkeypatch.setattr(tiled, "TILE", 16)


def inputs(b, t, kv=2, g=2, h=12, s=None):
    """q, k, v and a cotangent of the output."""
    shapes = (b, t, kv, g, h), (b, s or t, kv, h), (b, s or t, kv, h), (b, t, kv, g, h)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, n) for k, n in zip(keys, shapes, strict=True)]


def layout_of(case, branched=True):
    place = functools.partial(jax.device_put, device=named_sharding(spec("BT")))
    segments, branches, positions = map(place, case)
    return row_layout(segments, branches if branched else None, positions)


def results(implementation, arrays, layout, window):
    """The output and the gradients of its product with the cotangent."""
    letters = ("BTKGH", "BSKH", "BSKH", "BTKGH")
    arrays = [
        jax.device_put(x, named_sharding(spec(a))) for x, a in zip(arrays, letters, strict=True)
    ]

    @jax.jit
    def run(q, k, v, cotangent, queries, keys):
        here = layout._replace(queries=queries, keys=keys)
        attend = functools.partial(
            cases.attention, layout=here, window=window, implementation=implementation
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    return jax.device_get(run(*arrays, layout.queries, layout.keys))


def check(implementation, arrays, layout, mask, real, window):
    """Against float64, at the queries `B T` that are real; the others get no cotangent."""
    real = real[:, :, None, None, None]
    *arrays, cotangent = (np.asarray(x) for x in arrays)
    cotangent = cotangent * real
    got, *grads = results(implementation, (*arrays, cotangent), layout, window)
    want = cases.reference(*arrays, mask, cotangent)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (got * real, *grads), want, strict=True):
        # sums of up to 150 products of numbers of size 1; the largest error seen is 2.4e-6
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6, err_msg=name)


def check_rows(implementation, case, window, *, branched=True, **shape):
    arrays, layout = inputs(*case.segments.shape, **shape), layout_of(case, branched)
    mask = cases.table(case, window)
    check(implementation, arrays, layout, mask, case.segments > 0, window)


@pytest.mark.parametrize(("window", "group"), [(3, 4), (8, 1), (None, 2)])
@pytest.mark.parametrize("implementation", ["einsum", "tiled"])
def test_pairs_equal_float64(implementation, window, group):  # pitfalls 29, 35, 36, 37
    check_rows(implementation, cases.pairs_and_padding(37), window, g=group, h=10)


@pytest.mark.parametrize(("window", "group"), [(3, 4), (None, 2)])
def test_splash_equals_float64(window, group):
    """150 tokens, which the kernel has to fill up to 256."""
    check_rows("splash", cases.pairs_and_padding(150), window, g=group)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 3, 8, 150, None])
@pytest.mark.parametrize("implementation", ["einsum", "tiled", "splash"])
def test_all_windows_and_groups_equal_float64(implementation, window, group):
    check_rows(implementation, cases.pairs_and_padding(150), window, g=group)


@pytest.mark.parametrize(("implementation", "window"), [("tiled", 3), ("splash", None)])
def test_dialogues_equal_float64(implementation, window):
    check_rows(implementation, cases.dialogues_and_padding(40), window, branched=False)


@pytest.mark.usefixtures("sharded_mesh")
@pytest.mark.parametrize("implementation", ["tiled", SLOW_SPLASH])
def test_every_mesh_gives_the_same(implementation):
    check_rows(implementation, cases.pairs_and_padding(40), 5)


@pytest.mark.parametrize("implementation", ["einsum", "tiled"])
@pytest.mark.parametrize("window", [6, pytest.param(None, marks=pytest.mark.slow)])
def test_cached_keys_equal_float64(implementation, window):
    """Slots in no order, some empty; prompts padded on the left, one of padding alone."""
    rng = np.random.default_rng(3)
    positions, keys = np.full((3, 20), -1, np.int32), np.full((3, 41), -1, np.int32)
    for row, (past, new) in enumerate([(17, 20), (0, 13)]):
        positions[row, 20 - new :] = np.arange(past, past + new)
        keys[row, rng.permutation(41)[: past + new]] = np.arange(past + new)
    distance = positions[:, :, None] - keys[:, None]
    mask = (keys[:, None] != -1) & (distance >= 0)
    mask &= distance < (window or 99)
    layout = cache_layout(jnp.asarray(positions), jnp.asarray(keys))
    np.testing.assert_array_equal(visible(layout.queries, layout.keys, window), mask)
    check(implementation, inputs(3, 20, s=41), layout, mask, positions >= 0, window)


@pytest.mark.parametrize("implementation", ["einsum", "tiled", "splash"])
def test_padding_gets_finite_values_and_gradients(implementation):  # pitfall 36
    case = cases.pairs_and_padding(40)
    for x in results(implementation, inputs(4, 40), layout_of(case), 5):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("implementation", ["einsum", "tiled", SLOW_SPLASH])
def test_bfloat16_stays_near_float32(implementation):
    case = cases.pairs_and_padding(40)
    arrays = [x.astype(jnp.bfloat16) for x in inputs(4, 40)]
    arrays[3] = arrays[3] * jnp.asarray(case.segments > 0, jnp.bfloat16)[:, :, None, None, None]
    fine = results("einsum", [x.astype(jnp.float32) for x in arrays], layout_of(case), None)
    coarse = results(implementation, arrays, layout_of(case), None)
    real = (case.segments > 0)[:, :, None, None, None]
    for i, (a, b) in enumerate(zip(fine, coarse, strict=True)):
        assert b.dtype == jnp.bfloat16
        error = (a - b.astype(np.float32)) * (1 if i else real)
        # seen: at most 6.1e-3 of the root mean square
        assert np.sqrt((error**2).mean()) < 2e-2 * np.sqrt((a**2).mean())


def test_memory_of_tiled_attention_grows_with_the_row_and_not_with_its_square(monkeypatch):
    monkeypatch.undo()  # the tiles of real runs

    def temporary(implementation, t):
        def loss(q, k, v, segments, positions):
            layout = row_layout(segments, None, positions)
            return (cases.attention(q, k, v, layout, 1000, implementation) ** 2).sum()

        ints = [jax.ShapeDtypeStruct((2, t), jnp.int32)] * 2
        arrays = [jax.ShapeDtypeStruct((2, t, 2, *x, 32), jnp.float32) for x in ((4,), (), ())]
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, *ints)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary("tiled", 4096) < 0.1 * temporary("einsum", 4096)
    assert temporary("tiled", 8192) < 2.2 * temporary("tiled", 4096)


@pytest.fixture(scope="module")
def batch():
    """Two pairs a row, rows of padding among them."""
    rng = np.random.default_rng(5)
    sizes = [(6, 5, 7), (1, 3, 9), (11, 1, 1), (4, 8, 2)]
    documents = [random_pair(rng, 104, *size)[3] for size in sizes]
    rows = [packing.build_row(documents[i : i + 2], 40, 2) for i in (0, 2, 4, 4)]
    mask = np.stack([row["pair_ids"] for row in rows]) != 0
    ref = rng.normal(-30, 4, (4, 2, 2)).astype(np.float32) * mask[..., None]
    return PreferenceBatch(stack_rows(rows), jnp.asarray(mask), jnp.asarray(ref))


def run_of(recipe, cfg, attention):
    config = load_config(recipe)
    train = dataclasses.replace(config.train, attention=attention)
    return dataclasses.replace(config, model=cfg, train=train)


def loss_and_gradients(cfg, params, batch, implementation):
    sums = loss_sums(run_of("demo_dpo", cfg, implementation))
    grads, info = jax.jit(jax.grad(lambda p: sums(p, batch), has_aux=True))(params)
    return jax.device_get((info.sums["loss"], jax.tree.leaves(grads)))


@pytest.fixture(scope="module")
def wanted(cfg, params, batch):
    return loss_and_gradients(cfg, params, batch, "einsum")


@pytest.mark.slow
@pytest.mark.usefixtures("sharded_mesh")
@pytest.mark.parametrize("implementation", ["tiled", "splash"])
def test_losses_and_gradients_of_a_step_are_the_references(
    cfg, params, batch, wanted, implementation
):
    placed = jax.device_put(jax.device_get(params), param_shardings(cfg))
    letters = PreferenceBatch(jax.tree.map(lambda _: "BT", batch.rows), "BS", "BST")
    put = lambda x, axes: jax.device_put(jax.device_get(x), named_sharding(spec(axes)))  # noqa: E731
    here = jax.tree.map(put, batch, letters)
    loss, grads = loss_and_gradients(cfg, placed, here, implementation)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    for a, b in zip(wanted[1], grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def kernel_calls(jaxpr):
    """How often a jaxpr, its inner ones included, calls a Pallas kernel."""
    inner = jax.tree.leaves([equation.params for equation in jaxpr.eqns], is_leaf=is_jaxpr)
    count = sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns)
    return count + sum(kernel_calls(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_steps_run_the_kernel_once_for_dialogues_and_twice_for_pairs(cfg, params, batch):
    def calls(config, batch):
        return kernel_calls(jax.make_jaxpr(loss_sums(config))(params, batch).jaxpr)

    assert calls(run_of("demo_sft", cfg, "splash"), batch.rows) == 1
    assert calls(run_of("demo_dpo", cfg, "splash"), batch) == 2
    assert calls(run_of("demo_dpo", cfg, "auto"), batch) == 0


@pytest.mark.parametrize("window", [9, pytest.param(None, marks=pytest.mark.slow)])
def test_long_prompts_are_worked_through_in_tiles(cfg, params, window, monkeypatch):
    cfg = dataclasses.replace(cfg, sliding_window=window)
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 104)
    positions = np.stack([np.arange(33), np.maximum(np.arange(33) - 11, -1)])

    def prefill():
        cache = init_cache(cfg, 2, 48)
        return forward_cached(cfg, params, tokens, jnp.asarray(positions, jnp.int32), cache)[0]

    want = prefill()
    monkeypatch.setattr(module, "TILED_FROM", 33)
    assert "cond" in str(jax.make_jaxpr(prefill)())
    np.testing.assert_allclose(prefill(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "t", "dtype", "name"),
    [
        ("cpu", 383, "float32", "attend"),
        ("cpu", 384, "bfloat16", "tiled_over"),
        ("tpu", 64, "float32", "splash_over"),
        ("gpu", 64, "bfloat16", "cudnn_over"),
        ("gpu", 64, "float32", "attend"),
        ("gpu", 1024, "float32", "tiled_over"),
        ("gpu", 1023, "float16", "tiled_over"),
    ],
)
def test_auto_takes_what_suits_the_machine(machine, t, dtype, name, monkeypatch):
    called = []
    for other in ("attend", "tiled_over", "splash_over", "cudnn_over"):
        make = lambda *_, other=other, **__: called.append(other) or (lambda *_: called.append(0))  # noqa: E731
        monkeypatch.setattr(module, other, make)
    monkeypatch.setattr(module, "platform", lambda: machine)
    ones = jnp.ones((1, t), jnp.int32)
    attend = module.attention_over(row_layout(ones, None, ones), 7, "auto", 64, dtype)
    attend(None, None, None)
    assert called[0] == name


def test_the_machine_is_that_of_the_mesh():
    assert platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "attention='flash' is not known; use one of auto, einsum, tiled, splash, cudnn"),
        ("cudnn", "'cudnn' is for NVIDIA GPUs, .* here: cpu, float32, head_dim 10"),
    ],
)
def test_impossible_attention_is_refused(cfg, params, name, message):
    with pytest.raises(ValueError, match=message):
        zj.forward(
            cfg, params, jnp.ones((1, 4), jnp.int32), options=zj.ForwardOptions(attention=name)
        )


def test_splash_is_not_for_caches():
    layout = cache_layout(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="'splash' is for packed rows on TPU"):
        cases.attention(*inputs(1, 2, s=3)[:3], layout, None, "splash")
