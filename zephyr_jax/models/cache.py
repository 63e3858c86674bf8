"""The key-value cache of generation: a ring of as many slots as the sliding window needs."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zephyr_jax.config import MistralConfig
from zephyr_jax.sharding import spec


class KVCache(NamedTuple):
    """Keys (already rotated) and values of the last S positions of every row.

    Position p lives in slot p mod S; `positions` holds what each slot contains, -1 for nothing.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]


def init_cache(cfg: MistralConfig, batch: int, max_length: int) -> KVCache:
    """An empty cache for rows of at most `max_length` tokens; S = min(max_length, window)."""
    slots = min(max_length, cfg.sliding_window or max_length)
    shape = (cfg.num_hidden_layers, batch, slots, cfg.num_key_value_heads, cfg.head_dim)
    k = jnp.zeros(shape, cfg.dtype, out_sharding=spec("LBSKH"))
    positions = jnp.full((batch, slots), -1, jnp.int32, out_sharding=spec("BS"))
    return KVCache(k, jnp.zeros_like(k), positions)


def slots_of(positions: Int[Array, "B T"], n_slots: int) -> Int[Array, "B T"]:
    """The slot that each token is written to; n_slots (out of range, dropped) where none is.

    Of a row longer than the ring only the last n_slots tokens are written, and padding
    (position -1) never is.
    """
    last = positions.max(axis=1, keepdims=True)
    keep = (positions >= 0) & (positions > last - n_slots)
    return jnp.where(keep, positions % n_slots, n_slots)


def write(
    cached: Float[Array, "B S *K"] | Int[Array, "B S"],
    new: Float[Array, "B T *K"] | Int[Array, "B T"],
    slots: Int[Array, "B T"],
) -> Float[Array, "B S *K"] | Int[Array, "B S"]:
    """`cached` with the new entries put in their slots; out-of-range slots are dropped."""
    rows = jnp.arange(cached.shape[0])[:, None]
    out = spec("BSKH"[: cached.ndim])
    return cached.at[rows, slots].set(new.astype(cached.dtype), mode="drop", out_sharding=out)


def visible(
    cached: Float[Array, "B S *K"] | Int[Array, "B S"],
    new: Float[Array, "B T *K"] | Int[Array, "B T"],
    written: Float[Array, "B S *K"] | Int[Array, "B S"],
) -> Float[Array, "B S2 *K"] | Int[Array, "B S2"]:
    """The entries that the new tokens attend to (or are masked by).

    One token's window is what the ring holds once it is written. The first of several tokens
    still needs slots that the last ones overwrite, so those attend to the old ring and to
    each other.
    """
    return written if new.shape[1] == 1 else jnp.concatenate([cached, new], axis=1)
