"""The key-value cache of generation: a ring of as many slots as the sliding window needs.

It is `stacked`, all layers in one array, which a scan over layers updates in place, or `apart`,
an array for each layer, for layers that are written out one after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.sharding import spec
from zephyr_jax.types import AnyArray


class KVCache(NamedTuple):
    """Keys (already rotated) and values of the last S columns of a batch.

    All rows go on by the same number of tokens at a time, padding included: column c is in slot
    c mod S. `positions` holds the position of each row's token there, -1 for none, so rows that
    are padded on the left find their last S tokens.
    """

    k: Any  # L B K S H, or for each layer B K S H
    v: Any
    positions: Int[Array, "B S"]
    columns: Int[Array, ""]  # written so far


class LayerCache(NamedTuple):
    """What one layer reads and writes: its place in the stacks, or (None) arrays of its own."""

    k: Array
    v: Array
    layer: Array | None


class Place(NamedTuple):
    """Where a piece of every row is written, and what it attends to."""

    slots: Int[Array, " T"]  # S (out of range, dropped): a later column of the piece takes it
    beside: bool  # to the ring as it was, and to itself beside it; else to the ring with it in


def init_cache(cfg: MistralConfig, batch: int, max_length: int) -> KVCache:
    """An empty stacked cache for rows of at most `max_length` tokens, in cfg.dtype.

    It has S = min(max_length, window) slots.
    """
    slots = min(max_length, cfg.sliding_window or max_length)
    shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, slots, cfg.head_dim)
    k = jnp.zeros(shape, cfg.dtype, out_sharding=spec("LBKSH"))
    positions = jnp.full((batch, slots), -1, jnp.int32, out_sharding=spec("BS"))
    return KVCache(k, jnp.zeros_like(k), positions, jnp.int32(0))


def take_apart(cache: KVCache) -> KVCache:
    """The cache with an array for each layer."""
    return cache._replace(k=tuple(cache.k), v=tuple(cache.v))


def place_of(columns: Int[AnyArray, ""], n_new: int, n_slots: int, window: int | None) -> Place:
    """The slots of the next `n_new` columns.

    Of a piece longer than the ring only the last n_slots columns are written. One token's window
    is what the ring holds once it is written. The first of several tokens still needs slots that
    the last ones overwrite, so those attend to the ring as it was and to each other. Where the
    slots take the whole row nothing is overwritten.
    """
    index = jnp.arange(n_new)
    slots = jnp.where(index >= n_new - n_slots, (columns + index) % n_slots, n_slots)
    return Place(slots, beside=n_new > 1 and n_slots == window)


def extend_positions(
    cached: Int[Array, "B S"], new: Int[Array, "B T"], place: Place
) -> tuple[Int[Array, "B S2"], Int[Array, "B S"]]:
    """The positions of the keys that the piece attends to, and of the slots after it."""
    written = cached.at[:, place.slots].set(new, mode="drop", out_sharding=spec("BS"))
    return jnp.concatenate([cached, new], axis=1) if place.beside else written, written


def extend(
    cached: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], place: Place
) -> tuple[Float[Array, "B S2 K H"], Float[Array, "B S2 K H"], LayerCache]:
    """The keys and values that the piece attends to, and the cache with it, at the next layer."""
    (k, new_k), (v, new_v) = (
        _extend(stack, cached.layer, new, place) for stack, new in ((cached.k, k), (cached.v, v))
    )
    return k, v, LayerCache(new_k, new_v, None if cached.layer is None else cached.layer + 1)


def _extend(stack: Array, layer: Array | None, new: Array, place: Place) -> tuple[Array, Array]:
    # Heads come before slots in memory, as the products of decoding read them.
    new = new.swapaxes(1, 2).astype(stack.dtype)
    if len(place.slots) == 1:
        # One column of the whole stack: what a scatter, or a layer taken out and put back, would
        # copy stays where it is.
        start = (0, 0, place.slots[0], 0)
        if layer is None:
            written = seen = jax.lax.dynamic_update_slice(stack, new, start)
        else:
            written = jax.lax.dynamic_update_slice(stack, new[None], (layer, *start))
            seen = written[layer]
        return seen.swapaxes(1, 2), written
    ring = stack if layer is None else stack[layer]
    seen = jnp.concatenate([ring, new], axis=2)
    ring = ring.at[:, :, place.slots].set(new, mode="drop", out_sharding=spec("BKSH"))
    written = ring if layer is None else jax.lax.dynamic_update_index_in_dim(stack, ring, layer, 0)
    return (seen if place.beside else ring).swapaxes(1, 2), written
