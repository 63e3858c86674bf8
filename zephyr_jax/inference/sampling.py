"""How a reply is drawn: the settings, what changes the logits, and one draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from zephyr_jax.sharding import reshard
from zephyr_jax.types import AnyArray

TOP_LOGPS = 20  # tokens whose log-probs come with those of the drawn one


class Kind(NamedTuple):
    """What of a draw is compiled; the numbers come at run time, except top_k, which is a size."""

    random: bool
    n_sorted: int  # likeliest tokens that are sorted: top_k, or for top_p alone all


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How replies are drawn, and where they end.

    The filters apply in the order temperature, top_k, top_p, min_p, as in transformers (llama.cpp
    divides by the temperature last), after logit_bias and the penalties, in this order as in vLLM.
    A reply also ends where the model's positions do.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # draw from this many likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens whose probability reaches this
    min_p: float = 0.0  # draw from tokens at least this many times as likely as the likeliest
    seed: int = 0  # with a prompt's number it gives its random numbers, whatever the other prompts
    presence_penalty: float = 0.0  # OpenAI's: off the logit of a token that the reply has
    frequency_penalty: float = 0.0  # the same, as many times as the reply has it
    repetition_penalty: float = 1.0  # CTRL's: divides logits above 0 of tokens that prompt or reply
    # have, multiplies those below (Keskar et al. 2019, arXiv:1909.05858)
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # added, by token id
    min_new_tokens: int = 0  # before these no stop id is drawn, and no stop string ends the reply
    stop_ids: Sequence[int] | None = None  # None: the tokenizer's and the model's end of text
    stop: str | Sequence[str] = ()  # a reply is cut off before the one that is complete first

    def __post_init__(self) -> None:
        within = f"from 0 to max_new_tokens={self.max_new_tokens}"
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < np.inf, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
            "presence_penalty": (np.isfinite(self.presence_penalty), "a number (0: none)"),
            "frequency_penalty": (np.isfinite(self.frequency_penalty), "a number (0: none)"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "above 0 (1: none)"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, within),
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
        if self.temperature < np.finfo(np.float32).tiny:  # its float32 may be 0
            return Kind(False, 0)
        return Kind(True, self.top_k or (2**31 - 1 if self.top_p < 1 else 0))

    def numbers(self) -> np.ndarray:
        """The part that a program gets when it runs: temperature, top_p and min_p, float32."""
        return np.asarray([self.temperature, self.top_p, self.min_p], np.float32)


class Changes(NamedTuple):
    """What changes the logits before a draw; a program is compiled for those that are not None."""

    bias: Float[AnyArray, " V"] | None = None
    penalties: Float[AnyArray, " N"] | None = None  # repetition, presence, frequency
    prompted: Bool[AnyArray, "B V"] | None = None  # tokens of the prompt, with penalties
    earliest_stop: Int[AnyArray, " B"] | None = None  # first position where a stop id may be drawn
    allowed: UInt[AnyArray, "B W"] | None = None  # by a grammar: a bit for each, token 0 the lowest


def changed(
    logits: Float[Array, "B V"],
    changes: Changes,
    counts: Int[Array, "B V"] | None,
    stops: Bool[Array, "B V"] | None,
) -> Float[Array, "B V"]:
    """The logits with bias and penalties; those of tokens that may not be drawn are -inf.

    `counts` are how often each token is in the reply, `stops` what would end it too early.
    """
    if changes.bias is not None:
        logits = logits + changes.bias[None]
    if changes.penalties is not None and counts is not None and changes.prompted is not None:
        repetition, presence, frequency = changes.penalties
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        has = reshard(jnp.asarray(changes.prompted), "B.") | (counts > 0)
        logits = jnp.where(has, scaled, logits)
        logits -= frequency * counts + presence * (counts > 0)
    if stops is not None:
        logits = jnp.where(stops, -jnp.inf, logits)
    if changes.allowed is not None:
        words = jnp.asarray(changes.allowed)[:, :, None]
        bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
        bits = bits.reshape(len(logits), -1)[:, : logits.shape[1]]
        logits = jnp.where(reshard(bits, "B.") > 0, logits, -jnp.inf)
    return logits


class TokenLogps(NamedTuple):
    """Log-probs of tokens, and the likeliest tokens in their places; axes before K are any."""

    token: Float[AnyArray, "*axes"]
    top: Float[AnyArray, "*axes K"]
    top_ids: Int[AnyArray, "*axes K"]


def token_logps(
    logits: Float[Array, "*axes V"], tokens: Int[Array, "*axes"], vocab: int
) -> TokenLogps:
    """The model's own log-probs: of logits as they are, without temperature, bias or penalties.

    The likeliest are those below `vocab`; the distribution is over all, as in training.
    """
    logps = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = jax.lax.top_k(logps[..., :vocab], min(TOP_LOGPS, vocab))
    ids = jnp.arange(logits.shape[-1]).reshape((1,) * tokens.ndim + (-1,))
    token = jnp.where(tokens[..., None] == ids, logps, 0.0).sum(axis=-1)
    return TokenLogps(token, top, top_ids.astype(jnp.int32))


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

    The logits have the whole vocabulary on one device. top-k keeps exactly k of them; top-p the
    fewest likeliest whose probability, among what top-k kept, reaches p (both: of equal ones those
    with lower ids); min-p what is at least min_p times as likely as the likeliest.
    """
    if not kind.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p, min_p = numbers
    # The likeliest comes out as 0, not as infinity if the temperature is tiny.
    logits, ids = (logits - logits.max(axis=-1, keepdims=True)) / temperature, None
    if kind.n_sorted:
        logits, ids = jax.lax.top_k(logits, min(kind.n_sorted, logits.shape[1]))
        weights = jax.nn.softmax(logits, axis=-1)
        needed = jnp.cumsum(weights, axis=-1) - weights < jnp.where(top_p < 1, top_p, jnp.inf)
        logits = jnp.where(needed, logits, -jnp.inf)
    logits = jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.argmax(logits + reshard(noise, "B."), axis=-1, keepdims=True)
    if ids is not None:
        drawn = jnp.where(jnp.arange(ids.shape[1])[None] == drawn, ids, 0).sum(axis=-1)
    return drawn.reshape(-1).astype(jnp.int32)
