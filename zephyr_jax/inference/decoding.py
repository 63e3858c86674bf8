"""Prefill and decoding of a batch of rows: one compiled program, or two where somebody watches."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.inference.sampling import Kind, Sampling, row_keys, sample
from zephyr_jax.models.cache import KVCache, init_cache
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.sharding import axis_size, named_sharding, spec
from zephyr_jax.types import AnyArray, Params

CHUNK = 512  # tokens of a row that prefill works on at a time, so that its memory is bounded


class Speed:
    """Tokens and seconds, added up over calls; what compilation took is counted apart."""

    def __init__(self) -> None:
        self.prompt_tokens = self.new_tokens = 0
        self.compiling = self.prefill = self.decode = 0.0
        self._decoded = 0

    def __str__(self) -> str:
        said = f"{self.new_tokens} tokens in {self.prefill + self.decode:.1f} s"
        said += f": prefill {self.prompt_tokens / max(self.prefill, 1e-9):.0f} tok/s"
        if self._decoded:
            said += f", decode {self.decode_rate:.0f} tok/s"
        return f"{said} (compiling took {self.compiling:.1f} s before)"

    @property
    def decode_rate(self) -> float:
        """New tokens a second, over all rows, without those that prefill gives."""
        return self._decoded / max(self.decode, 1e-9)

    def add(self, tokens: np.ndarray, seconds: float, prompt_tokens: int = 0) -> None:
        """Counts one program's run; a prefill is one that had prompt tokens."""
        made = int((tokens >= 0).sum())
        self.new_tokens += made
        self.prompt_tokens += prompt_tokens
        if prompt_tokens:
            self.prefill += seconds
        else:
            self.decode += seconds
            self._decoded += made


class _Prompts(NamedTuple):
    tokens: Int[AnyArray, "B T"]  # on the right, left of them padding
    positions: Int[AnyArray, "B T"]  # -1 where there is no token
    lengths: Int[AnyArray, " B"]


class _Draw(NamedTuple):
    """What draws and ends a reply, as values of a program and not as part of it."""

    numbers: Float[AnyArray, " N"]
    seed: UInt[AnyArray, ""]
    rows: Int[AnyArray, " B"]
    stop_ids: Int[AnyArray, " N"]


class _State(NamedTuple):
    cache: KVCache
    token: Int[Array, " B"]  # the last one drawn, not in the cache yet; -1 in a finished row
    position: Int[Array, " B"]  # of that token
    done: Bool[Array, " B"]


class _Program(NamedTuple):
    """What is compiled in: each value has a program of its own."""

    cfg: MistralConfig
    kind: Kind
    vocab: int  # ids below this are drawn; more rows of the head are padding
    slots: int
    chunk: int


def _draw(how: _Program, draw: _Draw, logits: Array, cache: KVCache, position, done) -> _State:
    logits, keys = _laid_out(logits, "B.")[:, : how.vocab], row_keys(draw.seed, draw.rows)
    token = sample(logits, keys, _laid_out(position, "."), how.kind, draw.numbers)
    token = jnp.where(done, -1, token)
    stops = (token[:, None] == draw.stop_ids[None]).any(axis=1)
    full = position >= how.cfg.max_position_embeddings  # no such position to go on from
    return _State(cache, token, position, done | stops | full)


def _prefill(how: _Program, params: Params, prompts: _Prompts, draw: _Draw) -> _State:
    """The first token of every reply, and the cache of its prompt."""
    tokens, positions = jnp.asarray(prompts.tokens), jnp.asarray(prompts.positions)
    n, width = tokens.shape
    cache = init_cache(how.cfg, n, how.slots)
    step = functools.partial(forward_cached, how.cfg, params)
    if width <= how.chunk:
        logits, cache = step(tokens, positions, cache)
    else:

        def piece(x, i):
            return jax.lax.dynamic_slice_in_dim(x, i * how.chunk, how.chunk, axis=1)

        def one(i, carry):
            return step(piece(tokens, i), piece(positions, i), carry[1])

        pieces, used = width // how.chunk, -(-prompts.lengths.max() // how.chunk)
        start = jnp.zeros((n, how.cfg.vocab_size), jnp.float32, out_sharding=spec("BV"))
        logits, cache = jax.lax.fori_loop(pieces - used, pieces, one, (start, cache))
    return _draw(how, draw, logits, cache, prompts.lengths, prompts.lengths == 0)


def _decode(how: _Program, params: Params, state: _State, draw: _Draw, out: Array, made, limit):
    """Draws tokens until every row is done or has `limit`; `made` of them are in `out` already."""

    def go_on(carry):
        made, _, state = carry
        return (made < limit) & ~state.done.all()

    def one(carry):
        made, out, state = carry
        token, position = jnp.maximum(state.token, 0)[:, None], state.position[:, None]
        logits, cache = forward_cached(how.cfg, params, token, position, state.cache)
        state = _draw(how, draw, logits, cache, state.position + 1, state.done)
        return made + 1, _put(out, state.token, made), state

    _, out, state = jax.lax.while_loop(go_on, one, (jnp.asarray(made, jnp.int32), out, state))
    return _laid_out(out, ".."), state


def _put(out: Int[Array, "B N"], token: Int[Array, " B"], at) -> Int[Array, "B N"]:
    return jax.lax.dynamic_update_slice_in_dim(out, token[:, None], at, axis=1)


def _nothing(n: int, width: int) -> Int[Array, "B N"]:
    return jnp.full((n, width), -1, jnp.int32, out_sharding=spec("BT"))


def _laid_out(x: Array, letters: str) -> Array:
    partition = spec(letters)  # "." is whole: every process reads all replies, for instance
    return x if partition is None else jax.reshard(x, partition)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _reply(how: _Program, params: Params, prompts: _Prompts, draw: _Draw, width: int, limit):
    """Prefill and all of decoding: `B width` tokens."""
    state = _prefill(how, params, prompts, draw)
    out = _put(_nothing(len(state.token), width), state.token, 0)
    return _decode(how, params, state, draw, out, 1, limit)[0]


@functools.partial(jax.jit, static_argnums=0)
def _begin(how: _Program, params: Params, prompts: _Prompts, draw: _Draw):
    """The first token of every row, `B 1`, and the state to go on from."""
    state = _prefill(how, params, prompts, draw)
    return _laid_out(state.token[:, None], ".."), state


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _go_on(how: _Program, params: Params, state: _State, draw: _Draw, width: int, limit):
    """Up to `limit` more tokens of every row, `B width`."""
    out = _nothing(len(state.token), width)
    return _decode(how, params, state, draw, out, 0, limit)


def cast_params(cfg: MistralConfig, params: Params) -> Params:
    """The parameters in cfg.dtype, cast once and not at every token."""
    return jax.tree.map(lambda x: x.astype(cfg.dtype), params)


def rounded(n: int, unit: int) -> int:
    """`n` or somewhat more, so that few different sizes are compiled: 1, 2, 3, 4, 6, 8, ... units.

    Example: `rounded(300, 64)` is 384.
    """
    units = -(-n // unit)
    power = 1 << (units - 1).bit_length()
    return unit * (power * 3 // 4 if 0 < units <= power * 3 // 4 else power)


def _prompts(rows: list[list[int]], chunk: int) -> _Prompts:
    """The rows on the right of an array, with empty rows for every device's share to be equal."""
    longest = max(map(len, rows))
    width = rounded(longest, 64 if longest <= chunk else chunk)
    shares = axis_size("data", "fsdp")
    n = -(-len(rows) // shares) * shares
    tokens, positions = np.zeros((n, width), np.int32), np.full((n, width), -1, np.int32)
    lengths = np.zeros(n, np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], lengths[i] = row, len(row)
        positions[i, width - len(row) :] = np.arange(len(row))
    by_row = functools.partial(jax.device_put, device=named_sharding(spec("BT")))
    lengths = jax.device_put(lengths, named_sharding(spec("B")))
    return _Prompts(by_row(tokens), by_row(positions), lengths)


def _timed(speed: Speed | None, program: Any, *args: Any, prompt_tokens: int = 0) -> Any:
    """The result of a jitted program, its tokens on the host; its time noted where asked for."""
    if speed is not None:
        start = time.monotonic()
        program.lower(*args).compile()  # which the call then finds
        speed.compiling += time.monotonic() - start
    start = time.monotonic()
    tokens, state = program(*args)
    tokens = np.asarray(jax.device_get(tokens))
    if speed is not None:
        jax.block_until_ready(state)
        speed.add(tokens, time.monotonic() - start, prompt_tokens)
    return tokens, state


def decode(
    cfg: MistralConfig,
    params: Params,
    rows: list[list[int]],
    *,
    limit: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    seed: int = 0,
    first_row: int = 0,
    vocab: int | None = None,
    portion: int | None = None,
    finished: Bool[np.ndarray, " B"] | None = None,
    speed: Speed | None = None,
) -> Iterator[Int[np.ndarray, "B N"]]:
    """New tokens in portions, -1 after a stop token, or where all rows had ended.

    What a row gets depends on its prompt, the seed and the row's number, not on the other rows
    nor on the portions. A reply ends at a stop token, after `limit` tokens, or where the model's
    positions end.

    Args:
        cfg: the architecture.
        params: in cfg.dtype, as from `cast_params`.
        rows: token ids of the prompts.
        limit: most new tokens of a row.
        sampling: how tokens are drawn.
        stop_ids: tokens that end a reply.
        seed: of the draws.
        first_row: the number of the first row.
        vocab: only ids below this are drawn; None: all.
        portion: tokens of a row at a time, the first for itself; None: all at once.
        finished: rows that the caller has ended; looked at before every portion.
        speed: takes the times; prefill and decoding are then two programs.
    """
    # Nothing is kept, or computed, for tokens that have no position any more.
    limit = min(limit, max(cfg.max_position_embeddings - min(map(len, rows)) + 1, 1))
    prompts = _prompts(rows, CHUNK)
    n, width = prompts.tokens.shape
    slots = width + -(-limit // 64) * 64
    how = _Program(cfg, sampling.kind(), vocab or cfg.vocab_size, slots, CHUNK)
    numbers = np.arange(first_row, first_row + n, dtype=np.int32)
    stops = np.asarray(stop_ids, np.int32)
    draw = _Draw(sampling.numbers(), np.asarray(seed, np.uint32), numbers, stops)
    draw = jax.device_put(draw, named_sharding(spec("")))
    if portion is None and speed is None:
        out = _reply(how, params, prompts, draw, -(-limit // 64) * 64, limit)
        yield np.asarray(jax.device_get(out))[: len(rows), :limit]
        return
    n_prompt = sum(map(len, rows))
    tokens, state = _timed(speed, _begin, how, params, prompts, draw, prompt_tokens=n_prompt)
    portion, made = portion or -(-limit // 64) * 64, 0
    while True:
        yield tokens[: len(rows)]
        made += tokens.shape[1]
        state = _finish(state, finished)
        if made >= limit or bool(state.done.all()):
            return
        size = min(portion, limit - made)
        tokens, state = _timed(speed, _go_on, how, params, state, draw, portion, size)
        tokens = tokens[:, :size]


def _finish(state: _State, finished: np.ndarray | None) -> _State:
    if finished is None or not finished.any():
        return state
    finished = np.pad(finished, (0, len(state.done) - len(finished)))
    return state._replace(done=state.done | jax.device_put(finished, state.done.sharding))
