"""The key-value cache of generation: a ring of as many slots as the sliding window needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.sharding import spec
from zephyr_jax.types import AnyArray


class KVCache(NamedTuple):
    """Rotated keys and values of the last S columns of a batch; column c is in slot c mod S."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]  # of each row's token in a slot; -1 for none
    columns: Int[Array, ""]  # written so far


KeysValues = tuple[Array, Array]  # `B K S H` of one layer, or `L B K S H` of all


def init_cache(cfg: MistralConfig, batch: int, max_length: int) -> KVCache:
    """An empty cache in cfg.dtype, with S = min(max_length, window) slots."""
    slots = min(max_length, cfg.sliding_window or max_length)
    shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, slots, cfg.head_dim)
    k = jnp.zeros(shape, cfg.dtype, out_sharding=spec("LBKSH"))
    positions = jnp.full((batch, slots), -1, jnp.int32, out_sharding=spec("BS"))
    return KVCache(k, jnp.zeros_like(k), positions, jnp.int32(0))


def next_slots(columns: Int[AnyArray, ""], n_new: int, n_slots: int) -> Int[Array, " T"]:
    """The slots of the next `n_new` columns; S, out of range, for one that a later one replaces."""
    index = jnp.arange(n_new)
    return jnp.where(index >= n_new - n_slots, (columns + index) % n_slots, n_slots)


def written(cache: KVCache, new: KeysValues, positions: Int[Array, "B T"]) -> KVCache:
    """The cache with the new tokens of all layers in it."""
    n_new, n_slots = positions.shape[1], cache.positions.shape[1]
    slots = next_slots(cache.columns, n_new, n_slots)

    def put(stack: Array, new: Array) -> Array:
        new = new.astype(stack.dtype)
        if n_new == 1:  # in place, where a scatter would copy
            return jax.lax.dynamic_update_slice(stack, new, (0, 0, 0, slots[0], 0))
        return stack.at[:, :, :, slots].set(new, mode="drop", out_sharding=spec("LBKSH"))

    seen = cache.positions.at[:, slots].set(positions, mode="drop", out_sharding=spec("BS"))
    return KVCache(put(cache.k, new[0]), put(cache.v, new[1]), seen, cache.columns + n_new)
