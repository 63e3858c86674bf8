"""Replies: prefill, then decoding in one compiled loop, in portions where somebody watches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from zephyr_jax.config import MistralConfig
from zephyr_jax.data.chat import render_chat
from zephyr_jax.data.tokenizer import Tokenizer
from zephyr_jax.models.cache import KVCache, init_cache
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.sharding import axis_size, named, spec
from zephyr_jax.types import Params

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # a user's turn, messages, or token ids


class Sampling(NamedTuple):
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0


class _Decode(NamedTuple):
    cache: KVCache
    logits: Float[Array, "B V"]
    position: Int[Array, " B"]  # of the token to be drawn
    done: Bool[Array, " B"]
    key: PRNGKeyArray


def sample(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, " B"]:
    """One token per row. Top-k cuts first, then top-p keeps the fewest likeliest that reach p."""
    if (whole := spec("B.")) is not None:
        logits = jax.reshard(logits, whole)  # sorting needs all of the vocabulary in one place
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        keep = jnp.ones_like(ordered, bool)
        if sampling.top_k:
            keep &= jnp.arange(ordered.shape[-1])[None] < sampling.top_k
        weights = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        keep &= jnp.cumsum(weights, axis=-1) - weights < sampling.top_p
        least = jnp.where(keep, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(cfg: MistralConfig, params: Params, tokens, positions, slots: int):
    cache = init_cache(cfg, tokens.shape[0], slots)
    return forward_cached(cfg, params, tokens, positions, cache)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5), donate_argnums=2)
def _decode(
    cfg: MistralConfig,
    params: Params,
    state: _Decode,
    n: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> tuple[Int[Array, "B n"], _Decode]:
    """Up to `n` more tokens a row; -1 after a stop token, or where all rows had stopped."""
    out = jnp.full((state.done.shape[0], n), -1, jnp.int32, out_sharding=spec("BT"))

    def go_on(carry):
        at, _, state = carry
        return (at < n) & ~state.done.all()

    def one(carry):
        at, out, state = carry
        key, now = jax.random.split(state.key)
        token = jnp.where(state.done, -1, sample(state.logits, now, sampling))
        out = jnp.where(jnp.arange(n)[None] == at, token[:, None], out)
        stops = functools.reduce(jnp.logical_or, [token == i for i in stop_ids], state.done)
        logits, cache = forward_cached(
            cfg, params, jnp.maximum(token, 0)[:, None], state.position[:, None], state.cache
        )
        return at + 1, out, _Decode(cache, logits, state.position + 1, stops, key)

    _, out, state = jax.lax.while_loop(go_on, one, (jnp.int32(0), out, state))
    return out, state


def prompt_ids(tok: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string is one user turn, messages get the generation header."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if len(prompt) and isinstance(prompt[0], dict):
        messages: Any = list(prompt)
        return render_chat(tok, messages, add_generation_prompt=True)[0]
    return [int(i) for i in prompt]  # type: ignore[arg-type]  # ids, by exclusion


def _start(cfg: MistralConfig, params: Params, rows: list[list[int]], limit: int, seed: int):
    """Prefills left-padded rows; few distinct lengths, so that few programs are compiled."""
    longest = max(map(len, rows))
    width = -(-longest // 64) * 64
    n = -(-len(rows) // axis_size("data", "fsdp")) * axis_size("data", "fsdp")
    tokens, positions = np.zeros((n, width), np.int32), np.full((n, width), -1, np.int32)
    lengths = np.zeros(n, np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], lengths[i] = row, len(row)
        positions[i, width - len(row) :] = np.arange(len(row))
    place = functools.partial(jax.device_put, device=named(spec("BT")))
    slots = -(-(width + limit) // 64) * 64
    logits, cache = _prefill(cfg, params, place(tokens), place(positions), slots)
    vector = functools.partial(jax.device_put, device=named(spec("B")))
    return _Decode(cache, logits, vector(lengths), vector(lengths == 0), jax.random.key(seed))


def stream_ids(
    cfg: MistralConfig,
    params: Params,
    rows: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    seed: int = 0,
    portion: int | None = None,
) -> Iterator[np.ndarray]:
    """New tokens `B n` in portions of at most `portion` (None: all at once); -1 after a stop."""
    state = _start(cfg, params, rows, max_new_tokens, seed)
    portion = portion or max_new_tokens
    made = 0
    while made < max_new_tokens and not bool(state.done.all()):
        n = min(portion, max_new_tokens - made)
        out, state = _decode(cfg, params, state, n, sampling, stop_ids)
        made += n
        yield np.asarray(jax.device_get(out))[: len(rows)]


def generate(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """One reply per prompt, without the stop token.

    Args:
        cfg: the architecture.
        params: its parameters.
        tok: its tokenizer.
        prompts: one string, or a list of strings (one user turn each), message lists or id lists.
        max_new_tokens: the longest reply, in tokens.
        temperature: 0 is greedy.
        top_k: draw from this many likeliest tokens; 0: from all.
        top_p: draw from the fewest likeliest tokens whose probability reaches this.
        seed: the same seed and prompts give the same replies.
        stop_ids: tokens that end a reply; None: `</s>`.
        on_text: called with each new piece of the first prompt's reply as it is made.

    Raises:
        ValueError: if there is no prompt, a prompt is empty, or a setting is out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1], top_k={top_k} >= 0 "
            f"and max_new_tokens={max_new_tokens} >= 1"
        )
    if isinstance(prompts, str):
        prompts = [prompts]
    if any(isinstance(prompt, dict) for prompt in prompts):
        raise ValueError("prompts is one list of messages; give a list of such lists")
    rows = [prompt_ids(tok, prompt) for prompt in prompts]
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), params)  # once, not at every token
    if not rows or not all(rows):
        raise ValueError("there is no prompt, or an empty one")
    stops = (tok.eos_id,) if stop_ids is None else tuple(stop_ids)
    replies: list[list[int]] = [[] for _ in rows]
    shown = ""
    for new in stream_ids(
        cfg,
        params,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        stop_ids=stops,
        seed=seed,
        portion=4 if on_text else None,
    ):
        for reply, row in zip(replies, new, strict=True):
            reply += [int(i) for i in row if i >= 0 and i not in stops]
        if on_text:
            # a character may still lack bytes
            text = tok.decode(replies[0], continuation=True).rstrip("�")
            on_text(text[len(shown) :])
            shown = text
    texts = [tok.decode(reply, continuation=True) for reply in replies]
    if on_text:
        on_text(texts[0][len(shown) :])
    return texts
