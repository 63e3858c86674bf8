"""Prefill and decoding of a batch of rows, as two compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.inference import sampling as sampler
from zephyr_jax.inference.sampling import Changes, SamplingParams, TokenLogps
from zephyr_jax.models.cache import KVCache, init_cache
from zephyr_jax.models.mistral import as_module, forward_cached
from zephyr_jax.sharding import BATCH, axis_size, named_sharding, reshard, spec
from zephyr_jax.types import AnyArray, Params

CHUNK = 512  # tokens of a row that prefill processes at a time, so that its memory is bounded


class _DrawInputs(NamedTuple):
    numbers: Float[AnyArray, " N"]
    seed: UInt[AnyArray, ""]
    rows: Int[AnyArray, " B"]
    stop_ids: Int[AnyArray, " N"]  # filled up with -1, which is no token
    ended: Bool[AnyArray, " B"]  # by the caller
    changes: Changes = Changes()


class _State(NamedTuple):
    cache: KVCache
    token: Int[Array, " B"]  # the last one drawn, not in the cache yet; -1 in a finished row
    position: Int[Array, " B"]  # of that token
    done: Bool[Array, " B"]
    counts: Int[Array, "B V"] | None  # how often each token is in the reply, for penalties
    logps: TokenLogps | None  # of the last token


class _Program(NamedTuple):
    # The values that are compiled in.
    cfg: MistralConfig
    kind: sampler.Kind
    vocab: int  # ids below this are drawn; more rows of the head are padding
    slots: int
    chunk: int  # of prefill
    logps: bool = False  # whether those of the tokens are wanted


Tokens = tuple[Any, TokenLogps | None]  # new ones `B N`, and their log-probs if wanted


def _draw(program: _Program, draw: _DrawInputs, logits: Array, state: _State) -> _State:
    """The state with the next token of every row, at `state.position`."""
    whole, keys = reshard(logits, "B."), sampler.row_keys(draw.seed, draw.rows)
    position, changes, early = state.position, draw.changes, None
    if changes.earliest_stop is not None:
        ends = (jnp.arange(program.vocab)[:, None] == draw.stop_ids[None]).any(axis=1)
        early = ends[None] & reshard(position < changes.earliest_stop, "B")[:, None]
    logits = sampler.changed(whole[:, : program.vocab], changes, state.counts, early)
    token = sampler.sample(logits, keys, reshard(position, "."), program.kind, draw.numbers)
    token = jnp.where(state.done, -1, token)
    counts, logps = state.counts, None
    if counts is not None:
        counts = counts + (token[:, None] == jnp.arange(program.vocab)[None])
    if program.logps:
        logps = sampler.token_logps(whole, token, program.vocab)
    stops = (token[:, None] == draw.stop_ids[None]).any(axis=1)
    full = position >= program.cfg.max_position_embeddings  # the next position does not exist
    return _State(state.cache, token, position, state.done | stops | full, counts, logps)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    program: _Program,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    draw: _DrawInputs,
) -> tuple[Tokens, _State]:
    """The first token of every reply, and the state with the prompts in the cache."""
    (n, width), lengths = tokens.shape, positions[:, -1] + 1
    size = min(width, program.chunk)
    chunks, used = width // size, -(-lengths.max() // size)

    def one(i, carry):
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        new = at(tokens, axis=1), at(positions, axis=1)
        return forward_cached(program.cfg, params, *new, carry[1])

    cache = init_cache(program.cfg, n, program.slots)
    if chunks == 1:
        logits, cache = forward_cached(program.cfg, params, tokens, positions, cache, empty=True)
    else:
        logits = jnp.zeros((n, program.cfg.vocab_size), jnp.float32, out_sharding=spec("BV"))
        logits, cache = jax.lax.fori_loop(chunks - used, chunks, one, (logits, cache))
    counts = None
    if draw.changes.penalties is not None:
        counts = jnp.zeros((n, program.vocab), jnp.int32, out_sharding=spec("B."))
    state = _State(cache, lengths, lengths, lengths == 0, counts, None)
    state = _draw(program, draw, logits, state)
    return _replicated(_column(state)), state


def _column(state: _State) -> Any:
    """The last tokens, and their log-probs where they are wanted, as one column."""
    return jax.tree.map(lambda x: x[:, None], (state.token, state.logps))


def _replicated(tree: Any) -> Any:
    return jax.tree.map(lambda x: reshard(x, "." * x.ndim), tree)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _decode(
    program: _Program, params: Params, state: _State, draw: _DrawInputs, width: int, limit
) -> tuple[Tokens, _State]:
    """Up to `limit` more tokens of every row, and -1 behind them."""

    def unfinished(carry):
        step, _, state = carry
        return (step < limit) & ~state.done.all()

    def one(carry):
        step, out, state = carry
        token, position = jnp.maximum(state.token, 0)[:, None], state.position[:, None]
        logits, cache = forward_cached(program.cfg, params, token, position, state.cache)
        state = state._replace(cache=cache, position=state.position + 1)
        state = _draw(program, draw, logits, state)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
        return step + 1, jax.tree.map(put, out, _column(state)), state

    state = state._replace(done=state.done | reshard(jnp.asarray(draw.ended), "B"))
    out = jax.tree.map(lambda x: jnp.repeat(jnp.full_like(x, -1), width, 1), _column(state))
    _, out, state = jax.lax.while_loop(unfinished, one, (jnp.int32(0), out, state))
    return _replicated(out), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prompt_logps(
    cfg: MistralConfig, vocab: int, params: Params, tokens: Int[Array, "B T"]
) -> TokenLogps:
    model, (n, width), at_once = as_module(cfg, params), tokens.shape, 64
    hidden = reshard(model.hidden(tokens), "BTD")
    following = jnp.roll(tokens, -1, axis=1)

    def chunk(i: Array) -> TokenLogps:
        at = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=at_once, axis=1)
        logits = reshard(model.logits(at(hidden, i * at_once)), "B..")
        return sampler.token_logps(logits, at(following, i * at_once), vocab)

    chunks = jax.lax.map(chunk, jnp.arange(width // at_once))
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape((n, width, *x.shape[3:])), chunks)
    return _replicated(joined)


def prompt_logps(
    cfg: MistralConfig, params: Params, rows: list[list[int]], vocab: int
) -> list[TokenLogps]:
    """Of every row the log-probs of its tokens but the first, each after those before it."""
    tokens, _ = _padded(rows, CHUNK, left=False)  # so that no token sees the padding
    logps = jax.device_get(_prompt_logps(cfg, vocab, params, tokens))
    ends = [len(row) - 1 for row in rows]
    return [TokenLogps(*(x[i, :end] for x in logps)) for i, end in enumerate(ends)]


def cast_params(cfg: MistralConfig, params: Params) -> Params:
    """The parameters in cfg.dtype, cast once and not at every token."""
    return jax.tree.map(lambda x: x.astype(cfg.dtype), params)


def rounded(n: int, unit: int) -> int:
    """`n` or somewhat more, so that few sizes are compiled: 1, 2, 3, 4, 6, 8, ... units."""
    units = -(-n // unit)
    power = 1 << (units - 1).bit_length()
    return unit * (power * 3 // 4 if 0 < units <= power * 3 // 4 else power)


def _padded(rows: list[list[int]], chunk: int, left: bool = True) -> tuple[Array, Array]:
    """Tokens and positions (-1: padding, on the left) of rows; as many for every device."""
    longest, shards = max(map(len, rows)), axis_size(*BATCH)
    shape = (rounded(len(rows), shards), rounded(longest, 64 if longest <= chunk else chunk))
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
        start = shape[1] - len(row) if left else 0
        tokens[i, start : start + len(row)] = row
        positions[i, start : start + len(row)] = np.arange(len(row))
    return jax.device_put((tokens, positions), named_sharding(spec("BT")))


def _changes(sampling: SamplingParams, rows: list[list[int]], n: int, vocab: int) -> Changes:
    """What changes the logits of `n` rows, the last of which may be padding."""
    bias = penalties = prompted = earliest_stop = None
    if sampling.logit_bias:
        bias = np.zeros(vocab, np.float32)
        for token, value in sampling.logit_bias.items():
            if not 0 <= token < vocab:
                raise ValueError(f"logit_bias has token id {token}, the ids are 0 to {vocab - 1}")
            bias[token] = value
    settings = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if settings != (1, 0, 0):
        penalties, prompted = np.asarray(settings, np.float32), np.zeros((n, vocab), bool)
        for i, row in enumerate(rows):
            prompted[i, [token for token in row if token < vocab]] = True
    if sampling.min_new_tokens:
        lengths = [*map(len, rows), *[0] * (n - len(rows))]
        earliest_stop = np.asarray(lengths, np.int32) + sampling.min_new_tokens
    return Changes(bias, penalties, prompted, earliest_stop)


def decode(
    cfg: MistralConfig,
    params: Params,
    rows: list[list[int]],
    sampling: SamplingParams,
    *,
    vocab: int | None = None,
    chunk: int | None = None,
    numbers: Sequence[int] | None = None,
    room: int = 0,
    finished: Bool[np.ndarray, " B"] | None = None,
    allowed: UInt[np.ndarray, "B W"] | None = None,
    logps: bool = False,
) -> Iterator[Tokens]:
    """New tokens in chunks, -1 after a stop token, until all rows have ended; the first is `B 1`.

    A row's tokens depend on its prompt, the seed and the row's number (None: 0, 1, ...), not on the
    other rows nor on the size of a chunk (None: all at once). `params` are those of `cast_params`.
    Of `sampling`, `stop` is not read. Only ids below `vocab` are drawn. Replies of up to `room`
    tokens share a program. With `logps` log-probs come with the tokens. The caller may change two
    arrays, which are read before every chunk: `finished` are rows that it has ended, `allowed` the
    tokens that may be drawn, a bit for each (for chunks of one token).
    """
    # No slot and no step for tokens beyond the last position.
    positions = max(cfg.max_position_embeddings - min(map(len, rows)) + 1, 1)
    limit = min(sampling.max_new_tokens, positions)
    most, vocab = rounded(min(max(limit, room), positions), 64), vocab or cfg.vocab_size
    prompts = _padded(rows, CHUNK)
    n, width = prompts[0].shape
    program = _Program(cfg, sampling.kind(), vocab, width + most, CHUNK, logps)
    own = np.arange(n, dtype=np.int32)
    own[: len(rows)] = range(len(rows)) if numbers is None else numbers
    stops = np.asarray(sampling.stop_ids or (), np.int32)
    more = -len(stops) % 8 if len(stops) else 8  # few sizes to compile
    stops = np.pad(stops, (0, more), constant_values=-1)
    seed, changes = np.asarray(sampling.seed, np.uint32), _changes(sampling, rows, n, vocab)
    put = functools.partial(jax.device_put, device=named_sharding(spec("")))
    finished = np.zeros(n, bool) if finished is None else finished
    draw = put(_DrawInputs(sampling.numbers(), seed, own, stops, np.zeros(n, bool), changes))

    def drawing() -> _DrawInputs:
        ended, changes = draw.ended, draw.changes
        if finished.any():
            ended = put(np.pad(finished, (0, n - len(finished))))
        if allowed is not None:
            bits = np.pad(allowed, ((0, n - len(allowed)), (0, 0)), constant_values=1)
            changes = changes._replace(allowed=put(bits))
        return draw._replace(ended=ended, changes=changes)

    new, state = _prefill(program, params, *prompts, drawing())
    chunk, n_new, size = chunk or most, 0, 1
    while True:
        yield jax.tree.map(lambda x, size=size: x[: len(rows), :size], jax.device_get(new))
        n_new += size
        if n_new >= limit or finished.all() or bool(state.done.all()):
            return
        size = min(chunk, limit - n_new)
        new, state = _decode(program, params, state, drawing(), chunk, size)


def traced(
    cfg: MistralConfig, params: Params, size: tuple[int, int, int], sampling: SamplingParams
) -> tuple[Any, Any, _State]:
    """Prefill and decoding, traced for a `size` (rows, prompt, new tokens), and their state."""

    def shape(dtype: Any, *sizes: int, axes: str = "") -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=named_sharding(spec(axes)))

    rows, prompt, new = size
    program = _Program(cfg, sampling.kind(), cfg.vocab_size, prompt + new, CHUNK)
    ids = shape(jnp.int32, rows, prompt, axes="BT")
    each = (shape(jnp.float32, 3), shape(jnp.uint32), shape(jnp.int32, rows), shape(jnp.int32, 8))
    draw = _DrawInputs(*each, shape(jnp.bool_, rows))
    prefill = _prefill.trace(program, params, ids, ids, draw)
    state = prefill.out_info[1]
    return prefill, _decode.trace(program, params, state, draw, new, shape(jnp.int32)), state
