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


class LayerCache(NamedTuple):
    """The stacks of all layers, and which layer is next."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    layer: Int[Array, ""]


class CacheSlots(NamedTuple):
    """Where the next tokens of every row are written, and which keys they attend to."""

    slots: Int[Array, " T"]  # S (out of range, dropped) for a column that a later one replaces
    append: bool  # attend to the ring before the write and to the new keys; else to the ring after


def init_cache(cfg: MistralConfig, batch: int, max_length: int) -> KVCache:
    """An empty cache in cfg.dtype, with S = min(max_length, window) slots."""
    slots = min(max_length, cfg.sliding_window or max_length)
    shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, slots, cfg.head_dim)
    k = jnp.zeros(shape, cfg.dtype, out_sharding=spec("LBKSH"))
    positions = jnp.full((batch, slots), -1, jnp.int32, out_sharding=spec("BS"))
    return KVCache(k, jnp.zeros_like(k), positions, jnp.int32(0))


def next_slots(
    columns: Int[AnyArray, ""], n_new: int, n_slots: int, window: int | None
) -> CacheSlots:
    """The slots of the next `n_new` columns, of which only the last n_slots are written."""
    index = jnp.arange(n_new)
    slots = jnp.where(index >= n_new - n_slots, (columns + index) % n_slots, n_slots)
    # The first of several tokens still needs slots that the last ones overwrite.
    return CacheSlots(slots, append=n_new > 1 and n_slots == window)


def extend_positions(
    cached: Int[Array, "B S"], new: Int[Array, "B T"], slots: CacheSlots
) -> tuple[Int[Array, "B S2"], Int[Array, "B S"]]:
    """The positions of the keys that the new tokens attend to, and of the slots after the write."""
    written = cached.at[:, slots.slots].set(new, mode="drop", out_sharding=spec("BS"))
    return jnp.concatenate([cached, new], axis=1) if slots.append else written, written


def extend(
    cached: LayerCache, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], slots: CacheSlots
) -> tuple[Float[Array, "B K S2 H"], Float[Array, "B K S2 H"], LayerCache]:
    """The keys and values that the new tokens attend to, and the cache at the next layer."""
    k, new_k = _extend(cached.k, cached.layer, k, slots)
    v, new_v = _extend(cached.v, cached.layer, v, slots)
    return k, v, LayerCache(new_k, new_v, cached.layer + 1)


def _extend(stack: Array, layer: Array, new: Array, slots: CacheSlots) -> tuple[Array, Array]:
    new = new.astype(stack.dtype)
    if len(slots.slots) == 1:
        # In place, where a scatter, or a layer that is taken out and put back, would copy.
        start = (layer, 0, 0, slots.slots[0], 0)
        written = jax.lax.dynamic_update_slice(stack, new[None], start)
        return written[layer], written
    old = stack[layer]
    ring = old.at[:, :, slots.slots].set(new, mode="drop", out_sharding=spec("BKSH"))
    written = jax.lax.dynamic_update_index_in_dim(stack, ring, layer, 0)
    seen = jnp.concatenate([old, new], axis=2) if slots.append else ring
    return seen, written
