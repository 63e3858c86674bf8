"""Decoding at the ends of its ranges: more tokens than positions, temperatures near zero."""

import numpy as np
from conftest import random_params

from zephyr_jax.inference.decoding import decode
from zephyr_jax.inference.sampling import SamplingParams


def test_no_room_is_kept_for_tokens_without_a_position(cfg):
    params = random_params(cfg)
    new = {}
    for limit in (600, 10**7):  # the model has 512 positions
        chunks = decode(cfg, params, [[5, 6], [7, 8, 9]], SamplingParams(max_new_tokens=limit))
        new[limit] = np.concatenate(list(chunks), axis=1)
    assert new[600].shape == new[10**7].shape == (2, 511)
    np.testing.assert_array_equal(new[600], new[10**7])


def test_the_coldest_draws_are_greedy(cfg):
    params = random_params(cfg)

    def replies(temperature):
        sampling = SamplingParams(max_new_tokens=8, temperature=temperature)
        return np.concatenate(list(decode(cfg, params, [[5, 6, 7]], sampling)), axis=1)

    for temperature in (1e-30, 1e-38, 1e-45, 1e-60):
        np.testing.assert_array_equal(replies(temperature), replies(0.0))
