"""Sampling against the distribution that it is defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zephyr_jax.inference.sampling import SamplingParams, row_keys, sample


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
