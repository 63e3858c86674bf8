"""Every implementation of attention against float64, forward and backward, and inside the model."""

import dataclasses

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_pair, stack_rows, with_fields

from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.models import attention as module
from zephyr_jax.models import tiled
from zephyr_jax.models.cache import init_cache
from zephyr_jax.models.masks import cache_layout, row_layout, visible
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.training.steps import loss_sums
from zephyr_jax.types import PreferenceBatch

# The kernel compiles for ten seconds and more where every step of it is ordinary JAX.
SLOW_SPLASH = pytest.param("splash", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that short rows have many of them."""
    monkeypatch.setattr(tiled, "TILE", 16)


def check_rows(implementation, case, window, **shape):
    cases.check_rows(cases.named(implementation, window), case, window, **shape)


@pytest.mark.parametrize(("window", "group"), [(3, 4), (8, 1), (None, 2)])
@pytest.mark.parametrize("implementation", ["einsum", "tiled"])
def test_pairs_equal_float64(implementation, window, group):  # pitfalls 29, 35, 36, 37
    check_rows(implementation, cases.pairs_and_padding(37), window, g=group, h=10)


@pytest.mark.parametrize(("window", "group"), [(3, 4), (None, 2)])
def test_splash_equals_float64(window, group):
    """150 tokens, which the kernel has to fill up to 256."""
    check_rows("splash", cases.pairs_and_padding(150), window, g=group)


@pytest.mark.slow
def test_splash_of_long_rows_equals_float64(monkeypatch):
    monkeypatch.setattr(module, "ONE_CALL", 128)
    check_rows("splash", cases.pairs_and_padding(150), None)


@pytest.mark.parametrize("t", [128, 600, 2048])
def test_the_kernel_computes_the_mask_of_pairs(t):
    """Pairs and dialogues of any lengths, answers without a token, a row of one long pair."""
    rng = np.random.default_rng(t)
    rows = [[cases.pair(1, *sizes)] for sizes in ((t - 3, 2), (2, t - 3), (t // 2 - 1, t // 2))]
    rows.append([[*cases.pair(3, 9, 4), *((3, 3 + i) for i in range(7))]])  # a third answer
    for _ in range(9):
        sizes = np.diff([0, *np.sort(rng.integers(1, t, 3 * rng.integers(1, 9))), t])
        rows.append([cases.pair(*part) for part in sizes[: len(sizes) // 3 * 3].reshape(-1, 3)])
    segments, branches, _ = cases.packed(rows, t)
    queries = np.asarray(module._hidden(jnp.asarray(segments), jnp.asarray(branches)))
    index, others = np.arange(t), branches[:, None]
    seen = module._sees(queries[:, :, None], index) & (segments[:, :, None] == segments[:, None])
    wanted = (segments[:, :, None] == segments[:, None]) & (index[:, None] >= index)
    np.testing.assert_array_equal(seen, wanted & ((others == 0) | (others == branches[:, :, None])))


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
    run = cases.named(implementation, window)
    cases.check(run, cases.inputs(3, 20, s=41), layout, mask, positions >= 0)


@pytest.mark.parametrize("implementation", ["einsum", "tiled", SLOW_SPLASH])
def test_padding_gets_finite_values_and_gradients(implementation):  # pitfall 36
    layout = cases.layout_of(cases.pairs_and_padding(40))
    for x in cases.results(cases.named(implementation, 5), cases.inputs(4, 40), layout):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("implementation", ["einsum", "tiled", SLOW_SPLASH])
def test_bfloat16_stays_near_float32(implementation):
    case = cases.pairs_and_padding(40)
    layout, real = cases.layout_of(case), (case.segments > 0)[:, None, None, :, None]
    arrays = [x.astype(jnp.bfloat16) for x in cases.inputs(4, 40)]
    arrays[3] = arrays[3] * real.astype(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in arrays]
    fine = cases.results(cases.named("einsum", None), wide, layout)
    coarse = cases.results(cases.named(implementation, None), arrays, layout)
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
        arrays = [jax.ShapeDtypeStruct((2, 2, *x, t, 32), jnp.float32) for x in ((4,), (), ())]
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
    return with_fields(load_config(recipe), model=cfg, train={"attention": attention})


def kernel_calls(jaxpr):
    """How often a jaxpr, its inner ones included, calls a Pallas kernel."""
    inner = jax.tree.leaves([equation.params for equation in jaxpr.eqns], is_leaf=is_jaxpr)
    count = sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns)
    return count + sum(kernel_calls(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_steps_run_the_kernel_once(cfg, params, batch, monkeypatch):
    cfg = dataclasses.replace(cfg, sliding_window=None)

    def calls(config, batch):
        return kernel_calls(jax.make_jaxpr(loss_sums(config))(params, batch).jaxpr)

    assert calls(run_of("demo_sft", cfg, "splash"), batch.rows) == 1
    assert calls(run_of("demo_dpo", cfg, "splash"), batch) == 1
    assert calls(run_of("demo_dpo", cfg, "auto"), batch) == 0
    monkeypatch.setattr(module, "ONE_CALL", 32)  # and twice for pairs in longer rows
    assert calls(run_of("demo_dpo", cfg, "splash"), batch) == 2


@pytest.mark.parametrize(("implementation", "saved"), [("einsum", 1), ("tiled", 2), ("splash", 2)])
def test_saved_attention_is_not_computed_again(implementation, saved, capsys):
    """Tiles and splash need their log-sum-exps for the backward pass too."""
    run = cases.named(implementation, None)(cases.layout_of(cases.dialogues_and_padding(40)))
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    arrays = cases.inputs(4, 40)[:3]
    layer = jax.checkpoint(lambda *arrays: run(*arrays) ** 2, policy=policy)
    jax.ad_checkpoint.print_saved_residuals(layer, *arrays)
    lines = capsys.readouterr().out.splitlines()
    assert sum("named" in line or "output of" in line for line in lines) == saved, lines


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
        ("cpu", 383, "float32", "einsum"), ("cpu", 384, "bfloat16", "tiled"),
        ("tpu", 64, "float32", "splash"),
        ("gpu", 64, "bfloat16", "cudnn"), ("gpu", 64, "float32", "einsum"),
        ("gpu", 1024, "float32", "tiled"), ("gpu", 1023, "float16", "tiled"),
    ],
)  # fmt: skip
def test_auto_takes_what_suits_the_machine(machine, t, dtype, name, monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: machine)
    ones = jnp.ones((1, t), jnp.int32)
    assert module.auto(row_layout(ones, None, ones), 64, dtype) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "attention='flash' is not known; use one of auto, einsum, tiled, splash, cudnn"),
        ("cudnn", "'cudnn' is for NVIDIA GPUs, .* here: cpu, float32, head_dim 12"),
        ("splash", "'splash' is for packed rows on TPU"),
    ],
)
def test_impossible_attention_is_refused(name, message):
    layout = cache_layout(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=message):
        cases.attention(*cases.inputs(1, 2, s=3)[:3], layout, None, name)
