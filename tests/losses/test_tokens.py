import jax
import jax.numpy as jnp
import numpy as np
import preference_oracles as oracle
import pytest

import zephyr_jax as zj


def numpy_logps(logits, tokens, mask):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    out = np.zeros(tokens.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        if t:
            out[b, t] = logps[b, t - 1, tokens[b, t]]
    return out


def test_token_logps_equal_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 11)).astype(np.float32) * 5
    tokens = rng.integers(0, 11, (3, 7))
    mask = rng.random((3, 7)) < 0.6
    got = zj.token_logps(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(mask))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, numpy_logps(logits, tokens, mask), rtol=1e-5, atol=1e-6)


def test_logps_of_bfloat16_logits_are_summed_in_float32():
    shape = jax.eval_shape(
        zj.token_logps,
        jax.ShapeDtypeStruct((2, 5, 7), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 5), jnp.int32),
        jax.ShapeDtypeStruct((2, 5), jnp.bool_),
    )
    assert shape.dtype == jnp.float32


def test_the_first_token_of_a_row_is_never_a_target():
    mask = jnp.ones((1, 3), bool)
    logps = zj.token_logps(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), jnp.int32), mask)
    loss, info = zj.sft_loss(logps, mask)
    assert info.weight == 2
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_equals_float64(smoothing):
    rng = np.random.default_rng(1)
    parts = rng.normal(-40, 8, (4, 9))
    loss, info = zj.dpo_loss(
        *(jnp.asarray(p, jnp.float32) for p in parts), beta=0.3, label_smoothing=smoothing
    )
    batch = dict(zip(("pw", "pl", "rw", "rl"), parts, strict=True))
    want = oracle.sigmoid(batch, 0.3, smoothing)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(info.losses, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(info.chosen_rewards, 0.3 * (parts[0] - parts[2]), atol=2e-5)


def test_pairs_of_weight_zero_count_neither_in_sum_nor_in_mean():
    chosen = jnp.asarray([1.0, 5.0, 2.0])
    zero = jnp.zeros(3)
    loss, info = zj.dpo_loss(
        chosen, zero, zero, zero, beta=1.0, weights=jnp.asarray([True, False, True])
    )
    alone, _ = zj.dpo_loss(chosen[::2], zero[:2], zero[:2], zero[:2], beta=1.0)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert info.weight == 2


def test_pair_logps_sum_by_document_and_branch():
    logps = jnp.asarray([[0.0, -1, -2, -4, 0, -8, -16, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]])
    branches = jnp.asarray([[0, 1, 1, 2, 0, 1, 2, 0]])
    got = zj.pair_logps(logps, segments, branches, 3)
    np.testing.assert_array_equal(got, [[[-3, -4], [-8, -16], [0, 0]]])
