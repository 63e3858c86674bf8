"""Drawing the next token: temperature, then top-k, top-p and min-p, in transformers' order."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from zephyr_jax.sharding import spec
from zephyr_jax.types import AnyArray


class Sampling(NamedTuple):
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    def kind(self) -> Kind:
        """What a program is compiled for."""
        warm = self.temperature >= np.finfo(np.float32).tiny  # below, a float32 of it may be 0
        return Kind(bool(warm), self.top_k, self.top_p < 1, self.min_p > 0)

    def numbers(self) -> np.ndarray:
        """What it is given when it runs: temperature, top_p and min_p, float32."""
        return np.asarray([self.temperature, self.top_p, self.min_p], np.float32)


class Kind(NamedTuple):
    """Which steps a draw has; their numbers come at run time, except top_k, which is a size."""

    random: bool
    top_k: int
    top_p: bool
    min_p: bool


def row_keys(seed: int | UInt[AnyArray, ""], rows: Int[AnyArray, " B"]) -> Key[Array, " B"]:
    """A random key for every row, from the seed and the row's number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    positions: Int[Array, " B"],
    kind: Kind,
    numbers: Float[AnyArray, " N"],
) -> Int[Array, " B"]:
    """One token per row, drawn by the row's key and the position alone.

    The logits are divided by the temperature; top-k keeps exactly k of them (of equal ones those
    with lower ids); top-p keeps the fewest likeliest whose probability, among what top-k kept,
    reaches p (without top-k: and all that are as likely as the last of them); min-p keeps what is
    at least min_p times as likely as the likeliest.

    Args:
        logits: unscaled, float32, all of the vocabulary in one place.
        keys: a key per row, shape (B,), whole on every device.
        positions: of the tokens to be drawn, whole too.
        kind: the steps; `numbers` their numbers, as Sampling gives them.
        numbers: temperature, top_p and min_p.
    """
    if not kind.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p, min_p = numbers
    # Where the temperature is tiny the likeliest must come out as 0, not as infinity.
    logits, ids = (logits - logits.max(axis=-1, keepdims=True)) / temperature, None
    if kind.top_k:
        logits, ids = jax.lax.top_k(logits, min(kind.top_k, logits.shape[1]))
    if kind.top_p:
        weights = jax.nn.softmax(logits, axis=-1)
        if ids is None:
            keep = weights >= _least_kept(weights, top_p)
        else:
            keep = jnp.cumsum(weights, axis=-1) - weights < top_p
        logits = jnp.where(keep, logits, -jnp.inf)
    if kind.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    if (divided := spec("B.")) is not None:
        noise = jax.reshard(noise, divided)
    drawn = jnp.argmax(logits + noise, axis=-1, keepdims=True)
    if ids is not None:
        drawn = jnp.where(jnp.arange(ids.shape[1])[None] == drawn, ids, 0).sum(axis=-1)
    return drawn.reshape(-1).astype(jnp.int32)


def _least_kept(weights: Float[Array, "B V"], total: Any) -> Float[Array, "B 1"]:
    """The greatest weight for which all that are no smaller add up to `total`; 0 if none do.

    Found by halving, over the bits of a float, which for floats >= 0 are in their order: sorting
    32,000 numbers takes several times as long as all the rest of a small model's step on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # low: reaches the total, or is 0; high: does not
        middle = low + (high - low) // 2
        reached = jnp.where(bits >= middle, weights, 0).sum(axis=-1, keepdims=True) >= total
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    high = bits.max(axis=-1, keepdims=True) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
