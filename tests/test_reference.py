import dataclasses
from pathlib import Path

import jax.numpy as jnp

from zephyr_jax.config import load_config
from zephyr_jax.data.packed import PackedSet
from zephyr_jax.reference import reference_digest


def test_whatever_shapes_the_log_probs_shapes_their_digest():  # pitfall 15
    config = load_config("demo_dpo")
    rows = PackedSet(Path("packed") / "dpo-0123", {})
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    narrow = dataclasses.replace(config.model, dtype="bfloat16")
    digests = [
        reference_digest(config, params, rows),
        reference_digest(config, params | {"b": jnp.zeros(4).at[1].set(1e-30)}, rows),
        reference_digest(config, {"a": params["a"].T, "b": params["b"]}, rows),
        reference_digest(config, params, PackedSet(Path("packed") / "dpo-4567", {})),
        reference_digest(dataclasses.replace(config, model=narrow), params, rows),
    ]
    assert len(set(digests)) == len(digests)
    moved = PackedSet(Path("elsewhere") / "dpo-0123", {})
    assert reference_digest(config, params, moved) == digests[0]
