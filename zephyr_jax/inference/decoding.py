"""Prefill and decoding of a batch of rows, as two compiled programs."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.inference.sampling import Kind, SamplingParams, row_keys, sample
from zephyr_jax.models.cache import KVCache, init_cache
from zephyr_jax.models.mistral import forward_cached
from zephyr_jax.sharding import BATCH, axis_size, named_sharding, reshard, spec
from zephyr_jax.types import AnyArray, Params

CHUNK = 512  # tokens of a row that prefill processes at a time, so that its memory is bounded


class Throughput:
    """Tokens and seconds, summed over calls; those of compilation are separate."""

    def __init__(self) -> None:
        self.prompt_tokens = self.new_tokens = self._decoded = 0
        self.compiling = self.prefill = self.decode = 0.0

    def __str__(self) -> str:
        return (
            f"{self.new_tokens} tokens in {self.prefill + self.decode:.1f} s: "
            f"prefill {self.prompt_tokens / max(self.prefill, 1e-9):.0f} tok/s, "
            f"decode {self.decode_rate:.0f} tok/s (compiling took {self.compiling:.1f} s before)"
        )

    @property
    def decode_rate(self) -> float:
        """New tokens a second, over all rows, without those that prefill gives."""
        return self._decoded / max(self.decode, 1e-9)

    def add(self, tokens: np.ndarray, seconds: float, prompt_tokens: int) -> None:
        """Counts one program's run; a prefill is one that had prompt tokens."""
        n_new = int((tokens >= 0).sum())
        self.new_tokens += n_new
        self.prompt_tokens += prompt_tokens
        if prompt_tokens:
            self.prefill += seconds
        else:
            self.decode += seconds
            self._decoded += n_new


class _DrawInputs(NamedTuple):
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
    # The values that are compiled in.
    cfg: MistralConfig
    kind: Kind
    vocab: int  # ids below this are drawn; more rows of the head are padding
    slots: int
    chunk: int  # of prefill


def _draw(program: _Program, draw: _DrawInputs, logits: Array, cache: KVCache, position, done):
    logits, keys = reshard(logits, "B.")[:, : program.vocab], row_keys(draw.seed, draw.rows)
    token = sample(logits, keys, reshard(position, "."), program.kind, draw.numbers)
    token = jnp.where(done, -1, token)
    stops = (token[:, None] == draw.stop_ids[None]).any(axis=1)
    full = position >= program.cfg.max_position_embeddings  # the next position does not exist
    return _State(cache, token, position, done | stops | full)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    program: _Program,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    draw: _DrawInputs,
) -> tuple[Int[Array, "B 1"], _State]:
    """The first token of every reply, and the state with the prompts in the cache."""
    (n, width), lengths = tokens.shape, positions[:, -1] + 1
    size = min(width, program.chunk)
    chunks, used = width // size, -(-lengths.max() // size)

    def one(i, carry):
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        new = at(tokens, axis=1), at(positions, axis=1)
        return forward_cached(program.cfg, params, *new, carry[1])

    cache = init_cache(program.cfg, n, program.slots)
    logits = jnp.zeros((n, program.cfg.vocab_size), jnp.float32, out_sharding=spec("BV"))
    logits, cache = jax.lax.fori_loop(chunks - used, chunks, one, (logits, cache))
    state = _draw(program, draw, logits, cache, lengths, lengths == 0)
    return reshard(state.token[:, None], ".."), state


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _decode(
    program: _Program, params: Params, state: _State, draw: _DrawInputs, width: int, limit
) -> tuple[Int[Array, "B width"], _State]:
    """Up to `limit` more tokens of every row."""

    def unfinished(carry):
        step, _, state = carry
        return (step < limit) & ~state.done.all()

    def one(carry):
        step, out, state = carry
        token, position = jnp.maximum(state.token, 0)[:, None], state.position[:, None]
        logits, cache = forward_cached(program.cfg, params, token, position, state.cache)
        state = _draw(program, draw, logits, cache, state.position + 1, state.done)
        out = jax.lax.dynamic_update_slice_in_dim(out, state.token[:, None], step, axis=1)
        return step + 1, out, state

    out = jnp.full((len(state.token), width), -1, jnp.int32, out_sharding=spec("BT"))
    _, out, state = jax.lax.while_loop(unfinished, one, (jnp.int32(0), out, state))
    return reshard(out, ".."), state


def cast_params(cfg: MistralConfig, params: Params) -> Params:
    """The parameters in cfg.dtype, cast once and not at every token."""
    return jax.tree.map(lambda x: x.astype(cfg.dtype), params)


def rounded(n: int, unit: int) -> int:
    """`n` or somewhat more, so that few sizes are compiled: 1, 2, 3, 4, 6, 8, ... units."""
    units = -(-n // unit)
    power = 1 << (units - 1).bit_length()
    return unit * (power * 3 // 4 if 0 < units <= power * 3 // 4 else power)


def _padded(rows: list[list[int]], chunk: int) -> tuple[Array, Array]:
    """Tokens and positions (-1: padding) of the rows, on the right; as many for every device."""
    longest, shards = max(map(len, rows)), axis_size(*BATCH)
    shape = (-(-len(rows) // shards) * shards, rounded(longest, 64 if longest <= chunk else chunk))
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
        tokens[i, shape[1] - len(row) :] = row
        positions[i, shape[1] - len(row) :] = np.arange(len(row))
    return jax.device_put((tokens, positions), named_sharding(spec("BT")))


def _timed(
    throughput: Throughput | None, prompt_tokens: int, program: Any, *args: Any
) -> tuple[np.ndarray, _State]:
    """The result of a jitted program, its tokens on the host; its time is added to `throughput`."""
    if throughput is not None:
        start = time.monotonic()
        program.lower(*args).compile()  # which the call then finds
        throughput.compiling += time.monotonic() - start
    start = time.monotonic()
    tokens, state = program(*args)
    tokens = np.asarray(jax.device_get(tokens))
    if throughput is not None:
        jax.block_until_ready(state)
        throughput.add(tokens, time.monotonic() - start, prompt_tokens)
    return tokens, state


def decode(
    cfg: MistralConfig,
    params: Params,
    rows: list[list[int]],
    sampling: SamplingParams,
    *,
    vocab: int | None = None,
    chunk: int | None = None,
    finished: Bool[np.ndarray, " B"] | None = None,
    throughput: Throughput | None = None,
) -> Iterator[Int[np.ndarray, "B N"]]:
    """New tokens in chunks, -1 after a stop token, until all rows have ended; the first is `B 1`.

    A row's tokens depend on its prompt, the seed and the row's number, not on the other rows nor on
    the size of a chunk (None: all at once). `params` are those of `cast_params`, `rows` the token
    ids of the prompts. Of `sampling`, `stop` is not read, and `stop_ids=None` is none. Only ids
    below `vocab` are drawn. `finished` are rows that the caller has ended, read before every chunk.
    """
    # No slot and no step for tokens beyond the last position.
    room = cfg.max_position_embeddings - min(map(len, rows)) + 1
    limit = min(sampling.max_new_tokens, max(room, 1))
    most = -(-limit // 64) * 64
    prompts = _padded(rows, CHUNK)
    n, width = prompts[0].shape
    program = _Program(cfg, sampling.kind(), vocab or cfg.vocab_size, width + most, CHUNK)
    numbers = np.arange(sampling.first_row, sampling.first_row + n, dtype=np.int32)
    stops = np.asarray(sampling.stop_ids or (), np.int32)
    draw = _DrawInputs(sampling.numbers(), np.asarray(sampling.seed, np.uint32), numbers, stops)
    draw = jax.device_put(draw, named_sharding(spec("")))
    n_prompt = sum(map(len, rows))
    tokens, state = _timed(throughput, n_prompt, _prefill, program, params, *prompts, draw)
    chunk, n_new = chunk or most, 0
    while True:
        yield tokens[: len(rows)]
        n_new += tokens.shape[1]
        if finished is not None and finished.any():
            ended = np.pad(finished, (0, n - len(finished)))
            ended = jax.device_put(ended, state.done.sharding)
            state = state._replace(done=state.done | ended)
        if n_new >= limit or bool(state.done.all()):
            return
        size = min(chunk, limit - n_new)
        tokens, state = _timed(throughput, 0, _decode, program, params, state, draw, chunk, size)
        tokens = tokens[:, :size]
