import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_pair, stack_rows

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.losses.tokens import dpo_loss, sft_loss, token_logps
from zephyr_jax.models.mistral import token_scores
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.scores import micro_batches, reference_logps
from zephyr_jax.training.steps import loss_sums, train_step
from zephyr_jax.types import PreferenceBatch, TrainState


@pytest.fixture(scope="module")
def dpo_config(cfg):
    return dataclasses.replace(load_config("demo_dpo"), model=cfg)


@pytest.fixture(scope="module")
def sft_config(cfg):
    return dataclasses.replace(load_config("demo_sft"), model=cfg)


@pytest.fixture(scope="module")
def pairs():
    """Six pairs with answers of one to nine tokens, prompts of one to eleven."""
    rng = np.random.default_rng(5)
    sizes = [(6, 5, 7), (1, 3, 9), (11, 1, 1), (4, 8, 2), (7, 2, 6), (3, 4, 4)]
    return [random_pair(rng, 104, *size, pair_id=i + 1) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def preference_batch(pairs):
    """Two pairs a row, so that half of them lie behind another document; a fourth, empty row."""
    documents = [pair[3] for pair in pairs]
    packed = [packing.build_row(documents[i : i + 2], 48, 3) for i in (0, 2, 4)]
    packed.append(packing.build_row([], 48, 3))
    rng = np.random.default_rng(6)
    ids = np.stack([row["pair_ids"] for row in packed])
    ref = rng.normal(-30, 4, (4, 3, 2)).astype(np.float32) * (ids != 0)[..., None]
    return PreferenceBatch(stack_rows(packed), jnp.asarray(ids != 0), jnp.asarray(ref))


LONGEST = 24


def alone(cfg, params, pairs):
    """Log-probs `pair, answer, token` of each sequence prompt + answer in a row by itself."""
    tokens = np.zeros((len(pairs), 2, LONGEST), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, (prompt, *answers, _) in enumerate(pairs):
        for k, answer in enumerate(answers):
            n = len(prompt) + len(answer)
            tokens[i, k, :n], mask[i, k, len(prompt) : n] = prompt + answer, True
    rows, targets = tokens.reshape(-1, LONGEST), mask.reshape(-1, LONGEST)
    logps = token_logps(zj.forward(cfg, params, rows), rows, targets)
    return logps.reshape(tokens.shape), mask


def alone_loss(config, params, pairs, batch):
    policy = alone(config.model, params, pairs)[0].sum(-1)
    ref = jnp.asarray(batch.ref_logps)[jnp.asarray(batch.pair_mask)]
    return dpo_loss(*policy.T, *ref.T, beta=config.dpo.beta)[0]


@pytest.fixture(scope="module")
def alone_grads(dpo_config, params, pairs, preference_batch):
    loss = functools.partial(alone_loss, dpo_config, pairs=pairs, batch=preference_batch)
    return jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)


def test_packed_pairs_have_the_log_probs_of_each_sequence_alone(
    cfg, params, pairs, preference_batch
):
    rows = preference_batch.rows
    got = np.asarray(token_scores(cfg, params, rows).logps)
    each, mask = jax.jit(lambda p: alone(cfg, p, pairs)[0])(params), alone(cfg, params, pairs)[1]
    compared = 0
    for i, (*_, document) in enumerate(pairs):
        at = np.flatnonzero(np.asarray(rows.segments[i // 2]) == i % 2 + 1)
        assert len(at) == len(document.tokens)
        for branch in (1, 2):
            here = at[(document.branches == branch) & document.loss_mask]
            want = np.asarray(each[i, branch - 1])[mask[i, branch - 1]]
            np.testing.assert_allclose(got[i // 2, here], want, atol=1e-5)
            compared += len(here)
    assert compared == rows.loss_mask.sum()


def test_packed_pairs_have_the_loss_and_gradients_of_each_alone(
    dpo_config, params, preference_batch, alone_grads
):
    want_loss, want = alone_grads
    sums = loss_sums(dpo_config)

    def mean(params):
        total, info = sums(params, preference_batch)
        return total / info.sums["weight"]

    loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(a).max()))


def start(config, params, steps=10):
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, steps))
    copy = jax.tree.map(jnp.array, params)
    return optimizer, TrainState(jnp.int32(0), copy, optimizer.init(copy))


@pytest.mark.parametrize(
    ("dtype", "n_micro"),
    [("float32", 1), ("bfloat16", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("float32", 2), ("bfloat16", 1))],
)
def test_at_step_zero_the_loss_is_log_two_and_rewards_are_zero(
    dpo_config, params, preference_batch, n_micro, dtype
):  # pitfalls 14, 15
    model = dataclasses.replace(dpo_config.model, dtype=dtype)
    config = dataclasses.replace(dpo_config, model=model)
    score = jax.jit(functools.partial(reference_logps, model, n_pairs=3, n_micro=n_micro))
    batch = preference_batch._replace(ref_logps=score(params, preference_batch.rows))
    optimizer, state = start(config, params)
    step = jax.jit(train_step(loss_sums(config), optimizer, n_micro))
    state, info = step(state, batch)
    assert abs(float(info["loss"] / info["weight"]) - np.log(2)) < 1e-6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert info[name] == 0, name
    assert info["rewards/ties"] == info["weight"] == 6
    state, _ = step(state, batch)  # the first update has learning rate 0
    _, info = step(state, batch)
    assert abs(float(info["loss"] / info["weight"]) - np.log(2)) > 1e-5  # pitfall 15


def ragged_rows(n=8, t=16):
    rng = np.random.default_rng(7)
    rows = []
    for i in range(n):
        length = int(rng.integers(3, t + 1))
        ids = rng.integers(3, 104, length)
        targets = rng.random(length) < (0.9 if i % 2 else 0.2)
        targets[-1] = True
        rows.append(packing.build_row([packing.dialogue_document(ids, targets, t)], t, 0))
    return stack_rows(rows)


@pytest.mark.parametrize("n_micro", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(sft_config, params, n_micro):  # pitfalls 24, 49
    rows = ragged_rows()

    def grads(n):
        sgd = optax.sgd(1.0)
        step = jax.jit(train_step(loss_sums(sft_config), sgd, n))
        state, info = step(TrainState(jnp.int32(0), params, sgd.init(params)), rows)
        return jax.tree.map(lambda a, b: a - b, params, state.params), info

    (want, info), (got, same) = grads(1), grads(n_micro)
    np.testing.assert_allclose(info["loss"] / info["weight"], same["loss"] / same["weight"], 1e-6)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        # measured 4.1e-6 of the leaf's largest: the order of float32 additions
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(a).max()))


def test_micro_batches_keep_rows_on_their_devices():
    rows = jnp.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(micro_batches(rows, 2)[0], rows[0::2])
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2, 1),
        ("data", "fsdp", "tensor"),
        axis_types=explicit,
    )
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: micro_batches(x, 2))(
            jax.device_put(rows, named_sharding(spec("BT")))
        )
        assert jax.typeof(got).sharding.spec == jax.P(None, ("data", "fsdp"), None)


@pytest.mark.parametrize(
    "mesh",
    [(2, 2, 2)] + [pytest.param(x, marks=pytest.mark.slow) for x in (None, (1, 1, 1))],
    ids=["2x2x2", "no mesh", "1x1x1"],
    indirect=True,
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_step_is_the_same_on_every_mesh(
    kind, sft_config, dpo_config, params, preference_batch, mesh
):
    config, batch = (sft_config, ragged_rows()) if kind == "sft" else (dpo_config, preference_batch)
    sums = loss_sums(config)
    params, batch = jax.device_get((params, batch))  # made on another mesh than this test's

    def grads(params, batch):
        (_, info), grads = jax.value_and_grad(sums, has_aux=True)(params, batch)
        return info.sums["loss"], grads

    nothing = jax.sharding.Mesh(np.empty((), object), ())
    with jax.set_mesh(nothing):
        loss, want = jax.jit(grads)(params, batch)

    def place(x):
        return jax.device_put(x, named_sharding(spec("BTSG"[: x.ndim])))

    got_loss, got = jax.jit(grads)(
        jax.device_put(params, param_shardings(config.model)), jax.tree.map(place, batch)
    )
    np.testing.assert_allclose(jax.device_get(got_loss), loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, jax.device_get(b), atol=1e-4 * float(np.abs(a).max()))


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_no_collective_moves_rows_between_devices(
    kind, sft_config, dpo_config, params, preference_batch
):
    """Nothing but gathers of weights, reductions, and the embedding's gradients to their places."""
    config, batch = (sft_config, ragged_rows()) if kind == "sft" else (dpo_config, preference_batch)
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=explicit)
    sums = loss_sums(config)
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 10))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(config.model))
        state = TrainState(jnp.int32(0), placed, jax.jit(optimizer.init)(placed))
        batch = jax.tree.map(
            lambda x: jax.device_put(x, named_sharding(spec("BTSG"[: x.ndim]))), batch
        )
        text = jax.jit(train_step(sums, optimizer, 1)).lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    exchanged = [line for line in text.splitlines() if " all-to-all(" in line]
    assert len(exchanged) == 1
    assert "embedding_gradient" in exchanged[0]
    assert "collective-permute" not in text


def test_padding_tokens_may_be_any_id(sft_config, params):  # pitfalls 3, 38
    rows = ragged_rows()
    eos = np.where(rows.segments == 0, 2, rows.tokens)
    sums = jax.jit(jax.value_and_grad(loss_sums(sft_config), has_aux=True))
    (a, _), grads = sums(params, rows)
    (b, _), same = sums(params, rows._replace(tokens=eos))
    assert a == b
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_answers_end_token_carries_loss(cfg, params):  # pitfall 3
    document = packing.dialogue_document([1, 5, 9, 2], [0, 0, 1, 1], 8)
    rows = stack_rows([packing.build_row([document], 8, 0)])
    logps = token_scores(cfg, params, rows).logps
    assert logps[0, 3] < 0
    _, info = sft_loss(logps, jnp.asarray(rows.loss_mask))
    assert info.weight == 2


def test_bfloat16_masters_would_not_move(sft_config, params):  # pitfall 27
    """At DPO's learning rate an update is below half a bfloat16 step of nearly every weight."""
    optim = dataclasses.replace(sft_config.optim, peak_lr=5e-7, warmup_ratio=0.0)
    optimizer = make_optimizer(optim, make_schedule(optim, 10))
    # RMS-norm scales near 1 and weights that are not tiny, as in a trained model.
    params = jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 1e-2, 1e-2, x), params)

    def moved(params):
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        after = optax.apply_updates(params, updates)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True)
        return np.mean([float((a != b).mean()) for a, b in pairs])

    assert moved(params) > 0.6  # weights near 4 do not move in float32 either: half a step is 2e-7
    assert moved(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)) == 0
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def numpy_adamw(grads, rates, b1, b2, eps, clip):
    """Twenty steps of torch's AdamW in float64, from 0, without weight decay."""
    w, m, v, path = np.zeros(3), np.zeros(3), np.zeros(3), []
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_twenty_steps_of_adamw_equal_float64(sft_config, schedule):  # pitfall 26
    optim = dataclasses.replace(
        sft_config.optim, schedule=schedule, peak_lr=1e-2, warmup_ratio=0.17
    )
    total, warm = 20, 4  # ceil(0.17 * 20)
    rates = []
    for t in range(total):
        rest = (t - warm) / (total - warm)
        decay = 1 - rest if schedule == "linear" else 0.5 * (1 + np.cos(np.pi * rest))
        rates.append(1e-2 * (t / warm if t < warm else decay))
    assert rates[0] == 0
    grads = np.random.default_rng(0).normal(size=(20, 3)) * np.geomspace(0.01, 10, 20)[:, None]
    optimizer = make_optimizer(optim, make_schedule(optim, total))
    params = {"w": jnp.zeros(3)}
    state, path = optimizer.init(params), []
    for g in grads:
        updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"]))
    want = numpy_adamw(grads, rates, *optim.betas, optim.eps, optim.max_grad_norm)
    np.testing.assert_allclose(np.array(path), want, rtol=2e-5, atol=1e-8)


def test_weight_decay_spares_norm_scales(sft_config, params):
    optim = dataclasses.replace(sft_config.optim, weight_decay=0.5, warmup_ratio=0.0)
    optimizer = make_optimizer(optim, make_schedule(optim, 10))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p))(params)
    assert not updates["final_norm"].any()
    assert not updates["layers"]["mlp_norm"].any()
    np.testing.assert_allclose(updates["head"], -optim.peak_lr * 0.5 * params["head"], rtol=1e-5)


def test_the_embedding_gradient_is_summed_in_float32(cfg):
    """A token that occurs 4,096 times in a bfloat16 batch; a bfloat16 sum of ones stops at 256."""
    from zephyr_jax.models.layers import embed

    tokens = jnp.full((4, 1024), 7)

    def total(table):
        return embed(table, tokens, "bfloat16", "float32", "BTD").astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(total))(jnp.ones((11, 3)))
    np.testing.assert_array_equal(grad[7], 4096)
    assert not grad[:7].any()


def test_norm_scales_get_float32_gradients():
    from zephyr_jax.models.layers import rms_norm

    x = jnp.ones((4, 1024, 3), jnp.bfloat16)

    def total(scale):
        return rms_norm(x, scale, 1e-5).astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.ones(3)), 4096, rtol=1e-3)
