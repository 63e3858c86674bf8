"""What the tests of porting share: a small model and its tokenizer, trees compared bit by bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import toy as tok  # noqa: F401  420 tokens
from flax import traverse_util

import zephyr_jax as zj
from zephyr_jax.models.parameters import param_shapes


def small_config(**changes: Any) -> zj.MistralConfig:
    """Grouped queries, heads * head_dim != hidden; rows of 32s only in the MLP's second matrix."""
    fields = {"vocab_size": 424, "intermediate_size": 96, "sliding_window": 64}
    fields |= {"rope_theta": 54321.0, "initializer_range": 0.2}
    return dataclasses.replace(zj.MistralConfig.tiny(), **fields | changes)


def random_tree(cfg: zj.MistralConfig, dtype: str = "float32") -> dict[str, Any]:
    """Parameters of one magnitude, in NumPy."""
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=s).astype(dtype) for k, s in param_shapes(cfg).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same_tree(a: Any, b: Any) -> None:
    """Two trees are equal to the bit, dtypes included."""
    a, b = (traverse_util.flatten_dict(x, sep="/") for x in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


@pytest.fixture(scope="module")
def cfg() -> zj.MistralConfig:
    """A model four tokens larger than the tokenizer."""
    return small_config()


@pytest.fixture(scope="module")
def params(cfg: zj.MistralConfig) -> dict[str, Any]:
    """Its parameters."""
    return random_tree(cfg)
