import jax
import jax.numpy as jnp
import numpy as np
import preference_oracles as oracle
import pytest

import zephyr_jax as zj
from zephyr_jax.config.preference import LossOptions
from zephyr_jax.losses.pairs import divergence_score, label_metrics, means_of, wpo_weights


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
    inputs = ((2, 5, 7), jnp.bfloat16), ((2, 5), jnp.int32), ((2, 5), jnp.bool_)
    shape = jax.eval_shape(zj.token_logps, *(jax.ShapeDtypeStruct(*one) for one in inputs))
    assert shape.dtype == jnp.float32


def test_the_first_token_of_a_row_is_never_a_target():
    mask = jnp.ones((1, 3), bool)
    logps = zj.token_logps(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), jnp.int32), mask)
    loss, info = zj.sft_loss(logps, mask)
    assert info.weight == 2
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_equals_float64(smoothing):
    parts = np.random.default_rng(1).normal(-40, 8, (4, 9))
    loss, info = zj.dpo_loss(
        *(jnp.asarray(p, jnp.float32) for p in parts), beta=0.3, label_smoothing=smoothing
    )
    want = oracle.sigmoid(dict(zip(("pw", "pl", "rw", "rl"), parts, strict=True)), 0.3, smoothing)
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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("beta", (0.0, -0.1, np.inf, np.nan)),
        ("label_smoothing", (-0.1, 0.5)),
        ("divergence", ("kl", "js_divergence", -0.1, 1.1)),
        ("options.simpo_gamma_ratio", (-0.1, np.inf)),
        ("options.reward_alpha", (np.nan,)),
        ("options.ld_alpha", (-0.1, 1.1)),
        ("options.bco_decay", (-0.1, 1.5)),
        ("options.ref_sync_alpha", (0.0, 1.1)),
        ("options.ref_sync_steps", (0, 2.5)),
    ],
)
def test_options_out_of_range_are_named(name, values):
    for value in values:
        first, _, last = name.partition(".")
        with pytest.raises(ValueError, match=f"{name}="):
            LossOptions(**{"beta": 0.1} | {first: {last: value} if last else value})


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", 0.0, 1e-4, 0.3, 1.0])
def test_scores_equal_float64(divergence):
    options = LossOptions(beta=0.1, divergence=divergence)
    x = np.float64(np.float32(np.linspace(-4, 4, 41)))
    u = np.exp(x)
    want = x if divergence == 0 else oracle.f_prime(u, divergence)
    np.testing.assert_allclose(divergence_score(x, options), want, rtol=1e-5, atol=1e-6)
    slope = jax.vmap(jax.grad(lambda x: divergence_score(x, options)))(jnp.float32(x))
    alpha = {"reverse_kl": 0, "forward_kl": 1}.get(divergence, divergence)
    second = 1 / (1 + u) if divergence == "js" else u**-alpha
    np.testing.assert_allclose(slope, second, rtol=1e-4, atol=1e-6)  # u f''(u)
    far = jnp.asarray([-1e4, 1e4])
    assert np.isfinite(divergence_score(far, options)).all()
    assert np.isfinite(jax.vmap(jax.grad(lambda x: divergence_score(x, options)))(far)).all()


def test_wpo_weights_equal_float64_and_have_no_gradient():
    rng = np.random.default_rng(0)
    lengths, logits = (5, 8), rng.normal(0, 3, (2, 9, 11))
    tokens = rng.integers(0, 11, (2, 9))
    mask = np.arange(9)[None] < np.array(lengths)[:, None] + 1
    mask[:, 0] = False

    def weight(logits):
        logps = zj.token_logps(logits, jnp.asarray(tokens), jnp.asarray(mask))
        squares = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits), axis=-1)
        before = jnp.roll(squares, 1, axis=1)  # of the logits a token is drawn from
        sums = jnp.where(mask, logps - before, 0.0).sum(axis=1)
        return wpo_weights(sums, jnp.asarray(lengths, jnp.float32))

    value, slope = jax.value_and_grad(weight)(jnp.asarray(logits, jnp.float32))
    answers = zip(logits, tokens, lengths, strict=True)
    each = [oracle.wpo_weight(x[:n], t[1 : n + 1]) for x, t, n in answers]
    np.testing.assert_allclose(value, each[0] * each[1], rtol=1e-5)
    np.testing.assert_array_equal(slope, 0)


def test_labeled_answers_have_means_of_their_own():
    """TRL's names: chosen and rejected over the answers of that label, margins their difference."""
    rng, good = np.random.default_rng(0), np.array([1.0, 0, 1, 0, 0])
    logps, refs = rng.normal(-9, 2, (2, 5, 2))
    refs[3] = logps[3]
    sums = {k: x.sum() for k, x in label_metrics(logps, refs, good, 0.3).items()}
    means = means_of(sums | {"weight": 5.0, "loss": 2.5})
    reward = 0.3 * (logps - refs)[:, 0]
    assert means["loss"] == 0.5
    assert means["kl"] == pytest.approx((logps - refs)[:, 1].mean())
    assert means["rewards/chosen"] == pytest.approx(reward[[0, 2]].mean())
    assert means["logps/rejected"] == pytest.approx(logps[[1, 3, 4], 0].mean())
    gap = reward[[0, 2]].mean() - reward[[1, 3, 4]].mean()
    assert means["rewards/margins"] == pytest.approx(gap)
    assert means["rewards/ties"] == 0.2
    right = (reward > 0) == (good > 0)
    assert means["rewards/accuracies"] == np.delete(right, 3).sum() / 5
    alone = means_of({k: x[:1].sum() for k, x in label_metrics(logps, refs, good, 0.3).items()}
                     | {"weight": 1.0})  # fmt: skip
    assert "rewards/chosen" in alone
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & alone.keys()
