"""What saves memory changes no result: named outputs, host memory, smaller moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zephyr_jax as zj
from zephyr_jax.config.run import SAVED, load_config
from zephyr_jax.training.optim import make_optimizer


def tokens_of(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 104)


@pytest.mark.parametrize(
    "remat", ["dots", "full", "offload", ("q", "k", "v", "attention"), ("gate", "up")]
)
def test_gradients_are_the_same_whatever_is_saved(cfg, params, remat):
    tokens = tokens_of((2, 7))

    def loss(params, remat):
        logits = zj.forward(cfg, params, tokens, options=zj.ForwardOptions(remat=remat))
        return zj.token_logps(logits, tokens, tokens > -1).sum()

    kept = jax.jit(jax.grad(loss), static_argnums=1)(params, "none")
    recomputed = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_named_outputs_are_what_is_saved(cfg, params):
    tokens = tokens_of((2, 7))

    def kept(remat):
        grad = jax.grad(
            lambda p: zj.forward(cfg, p, tokens, options=zj.ForwardOptions(remat=remat)).sum()
        )
        return str(jax.make_jaxpr(grad)(params)).count("dot_general")

    assert kept(SAVED) < kept(("q", "k", "v")) < kept("full")


def run(steps=12, shape=(3, 160, 192), **changes):
    """Parameters after some steps of AdamW, and the last optimizer state."""
    optim = dataclasses.replace(load_config("zephyr_7b_sft").optim, **changes)
    optimizer = make_optimizer(optim, lambda _: 1e-2)
    params = {"w": jnp.zeros(shape), "norm": jnp.ones(5)}
    state = jax.jit(optimizer.init)(params)

    slope = jnp.linspace(-2, 2, shape[-1])[None, None]

    @jax.jit
    def step(params, state, key):
        first, second = jax.random.split(key)
        grads = {
            "w": jax.random.normal(first, shape) + slope,
            "norm": jax.random.normal(second, (5,)),
        }
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


def test_moments_in_host_memory_change_no_bit():
    params, state = run()
    hosted, host_state = run(offload_optimizer=True)
    for a, b in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((hosted, host_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(host_state) if x.ndim}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"device"}


def test_a_bfloat16_mean_stays_near():
    params, _ = run()
    halved, state = run(mu_dtype="bfloat16")
    wide = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(wide) == 2
    moved = np.abs(params["w"]).max()
    assert 0 < np.abs(params["w"] - halved["w"]).max() < 0.02 * moved


def factored(steps, shape, b1, b2, eps):
    """Adafactor with a mean of its updates, in float64 by the paper's formulas (Algorithm 4, 5)."""
    params = np.zeros(shape)
    row, column, mean = np.zeros(shape[:2]), np.zeros((shape[0], shape[2])), np.zeros(shape)
    norm, norm_square, norm_mean = np.ones(5), np.zeros(5), np.zeros(5)
    limit = load_config("zephyr_7b_sft").optim.max_grad_norm
    for t in range(1, steps + 1):
        keys = jax.random.split(jax.random.key(t - 1))
        grad = np.float64(jax.random.normal(keys[0], shape)) + np.linspace(-2, 2, shape[-1])
        other = np.float64(jax.random.normal(keys[1], (5,)))
        total = np.sqrt((grad**2).sum() + (other**2).sum())
        grad, other = (g * min(1, limit / total) for g in (grad, other))
        share = 1 - float(t) ** -b2
        square = grad**2 + eps
        row = share * row + (1 - share) * square.mean(axis=2)
        column = share * column + (1 - share) * square.mean(axis=1)
        estimate = row[:, :, None] * column[:, None] / row.mean(axis=1)[:, None, None]
        update = grad / np.sqrt(estimate)
        update /= max(1, np.sqrt((update**2).mean()))
        mean = b1 * mean + (1 - b1) * update
        params = params - 1e-2 * mean
        norm_square = share * norm_square + (1 - share) * (other**2 + eps)
        update = other / np.sqrt(norm_square)
        update /= max(1, np.sqrt((update**2).mean()))
        norm_mean = b1 * norm_mean + (1 - b1) * update
        norm = norm - 1e-2 * norm_mean
    return params, norm


def test_adafactor_is_the_papers():
    shape = (3, 160, 192)
    params, state = run(name="adafactor", betas=(0.9, 0.8), eps=1e-30, weight_decay=0.0)
    want, norm = factored(12, shape, 0.9, 0.8, 1e-30)
    np.testing.assert_allclose(params["w"], want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(params["norm"], norm, rtol=0, atol=1e-5)
    squares = sum(x.size for x in jax.tree.leaves(state)) - params["w"].size - 2 * 5
    assert squares < 0.02 * params["w"].size


def test_adafactor_takes_no_eps_of_adam():
    optim = load_config("zephyr_7b_sft").optim
    with pytest.raises(ValueError, match="drown"):
        dataclasses.replace(optim, name="adafactor")
    with pytest.raises(ValueError, match="rmsprop has neither"):
        dataclasses.replace(
            optim, name="rmsprop", betas=(0.0, 0.99), weight_decay=0.0, mu_dtype="bfloat16"
        )
