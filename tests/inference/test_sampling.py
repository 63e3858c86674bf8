"""Sampling against the distribution that it is defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zephyr_jax.inference.sampling import Changes, SamplingParams, changed, row_keys, sample


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution in float64, by sorting, in transformers' order."""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    kept = order[: top_k or None]
    weights[~np.isin(np.arange(len(weights)), kept)] = 0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= top_p]] = 0
    weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


PROBABILITIES = np.array([0.04, 0.3, 0.13, 0.05, 0.38, 0.1])
_sample = jax.jit(sample, static_argnums=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.37},
        {"top_k": 3, "top_p": 0.82},
        {"min_p": 0.3},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.6},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.95, "min_p": 0.15},
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(settings):
    n = 20000
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (n, 1))
    how = SamplingParams(**{"temperature": 1.0} | settings)
    # 100 rows at 200 positions each: both must make a difference
    keys, positions = row_keys(0, np.arange(n, dtype=np.int32) // 200), jnp.arange(n) % 200
    drawn = _sample(logits, keys, positions, how.kind(), how.numbers())
    got = np.bincount(np.asarray(drawn), minlength=6) / n
    want = oracle(np.log(PROBABILITIES), **settings)
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(want))
    assert (np.abs(got - want) <= 4.5 * np.sqrt(want * (1 - want) / n)).all()


def test_cold_sampling_is_greedy_and_ties_leave_exactly_k():
    keys, positions = row_keys(1, np.arange(500, dtype=np.int32)), jnp.arange(500)

    def drawn(logits, **settings):
        how = SamplingParams(**settings)
        tiled = jnp.tile(jnp.asarray(logits, jnp.float32), (500, 1))
        return set(map(int, _sample(tiled, keys, positions, how.kind(), how.numbers())))

    for temperature in (0.01, 1e-30, 1e-38, 1e-45, 1e-60):
        assert drawn(np.log(PROBABILITIES), temperature=temperature) == {4}
    assert drawn([0, 1, 1, 1, 1], temperature=1.0, top_k=2) == {1, 2}
    assert drawn([0, 1, 1, 1, 1], temperature=1.0, top_k=9, min_p=0.9) == {1, 2, 3, 4}
    assert drawn([0, 1, 1, 1, 1], temperature=1.0, top_p=0.3) == {1, 2}


def changed_in_float64(logits, prompt, reply, bias, repetition, presence, frequency):
    """Token by token: bias, CTRL's penalty as transformers has it, then OpenAI's two."""
    out = []
    for token, x in enumerate(np.asarray(logits, np.float64)):
        x += bias.get(token, 0.0)
        if token in prompt or token in reply:
            x = x / repetition if x > 0 else x * repetition
        n = reply.count(token)
        out.append(x - frequency * n - (presence if n else 0.0))
    return np.array(out)


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"),
    [(1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (1.3, 0.0, 0.0), (0.8, -1.5, 2.0)],
)
def test_penalties_equal_their_definition_in_float64(repetition, presence, frequency):
    rng, n = np.random.default_rng(0), 40
    logits = rng.normal(0, 4, (3, n)).astype(np.float32)
    prompts = [rng.integers(0, n, 12).tolist() for _ in logits]
    replies = [rng.integers(0, n, k).tolist() for k in (0, 9, 30)]
    bias = {3: -100.0, 7: 2.5, 39: 100.0}
    counts = np.stack([np.bincount(np.array(r, int), minlength=n) for r in replies])
    dense = np.zeros(n, np.float32)
    dense[list(bias)] = list(bias.values())
    changes = Changes(
        bias=dense,
        penalties=np.array([repetition, presence, frequency], np.float32),
        prompted=np.stack([np.isin(np.arange(n), p) for p in prompts]),
    )
    got = changed(jnp.asarray(logits), changes, jnp.asarray(counts, jnp.int32), None)
    for row, (x, prompt, reply) in enumerate(zip(logits, prompts, replies, strict=True)):
        want = changed_in_float64(x, prompt, reply, bias, repetition, presence, frequency)
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-5)


def test_only_allowed_tokens_are_left():
    logits, n = jnp.asarray(np.random.default_rng(0).normal(size=(2, 70)), jnp.float32), 70
    words = np.zeros((2, 3), np.uint32)
    for row, token in ((0, 0), (0, 31), (0, 69), (1, 32)):
        words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    got = np.asarray(changed(logits, Changes(allowed=jnp.asarray(words)), None, None))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in got] == [[0, 31, 69], [32]]
    np.testing.assert_array_equal(got[0, [0, 31, 69]], logits[0, jnp.asarray([0, 31, 69])])
    assert got.shape == (2, n)
