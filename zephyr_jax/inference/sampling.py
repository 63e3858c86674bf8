"""How a reply is drawn: the settings, and one draw (temperature, top-k, top-p, min-p, in order)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from zephyr_jax.sharding import reshard
from zephyr_jax.types import AnyArray


class Kind(NamedTuple):
    """The steps of a draw; their numbers come at run time, except top_k, which is a size."""

    random: bool
    top_k: int
    top_p: bool
    min_p: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How replies are drawn, and where they end.

    The filters apply in the order temperature, top_k, top_p, min_p, as in transformers (llama.cpp
    divides by the temperature last). A reply also ends where the model's positions do.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # draw from this many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens whose probability reaches this
    min_p: float = 0.0  # draw from tokens at least this many times as likely as the likeliest
    seed: int = 0  # with a prompt's number it gives its random numbers, whatever the other prompts
    first_row: int = 0  # number of the first prompt, for a list that is processed in several calls
    stop_ids: Sequence[int] | None = None  # None: the tokenizer's and the model's end of text
    stop: str | Sequence[str] = ()  # a reply is cut off before the one that is complete first

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stop:
            raise ValueError("stop has an empty string, which every reply contains; leave it out")
        object.__setattr__(self, "stop", stop)

    def kind(self) -> Kind:
        """The part that is compiled into a program."""
        warm = self.temperature >= np.finfo(np.float32).tiny  # below, a float32 of it may be 0
        return Kind(bool(warm), self.top_k, self.top_p < 1, self.min_p > 0)

    def numbers(self) -> np.ndarray:
        """The part that a program gets when it runs: temperature, top_p and min_p, float32."""
        return np.asarray([self.temperature, self.top_p, self.min_p], np.float32)


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

    The logits, with the whole vocabulary on one device, are divided by the temperature. top-k keeps
    exactly k of them (of equal ones those with lower ids); top-p the fewest likeliest whose
    probability, among what top-k kept, reaches p (without top-k: and all as likely as the last of
    them); min-p what is at least min_p times as likely as the likeliest.
    """
    if not kind.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p, min_p = numbers
    # If the temperature is tiny, the likeliest must come out as 0, not as infinity.
    logits, ids = (logits - logits.max(axis=-1, keepdims=True)) / temperature, None
    if kind.top_k:
        logits, ids = jax.lax.top_k(logits, min(kind.top_k, logits.shape[1]))
    if kind.top_p:
        weights = jax.nn.softmax(logits, axis=-1)
        if ids is None:
            ordered = jnp.sort(weights, axis=-1, descending=True)
            needed = jnp.cumsum(ordered, axis=-1) - ordered < top_p
            keep = weights >= jnp.where(needed, ordered, 1.0).min(axis=-1, keepdims=True)
        else:
            keep = jnp.cumsum(weights, axis=-1) - weights < top_p
        logits = jnp.where(keep, logits, -jnp.inf)
    if kind.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.argmax(logits + reshard(noise, "B."), axis=-1, keepdims=True)
    if ids is not None:
        drawn = jnp.where(jnp.arange(ids.shape[1])[None] == drawn, ids, 0).sum(axis=-1)
    return drawn.reshape(-1).astype(jnp.int32)
