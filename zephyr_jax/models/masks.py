"""Which key a query sees: one rule for packed rows, cached keys, and every block of either.

A query sees a key iff both belong to the same document, the key is not later, the key is in the
shared prefix or in the query's own branch, and it lies inside the sliding window *by position*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from zephyr_jax.sharding import spec

Attend = Callable[[Array, Array, Array], Array]  # q `B K G T H`, k and v `B K S H` -> like q


class Tokens(NamedTuple):
    """What the rule compares, of every query or of every key."""

    segments: Int[Array, "B T"]  # 0: no token
    branches: Int[Array, "B T"] | None  # None: no branches, which is known when compiling
    positions: Int[Array, "B T"]
    order: Int[Array, "B T"]  # a key of a higher order is later


class Layout(NamedTuple):
    """The queries and keys of one attention; `packed`: the keys are the queries, in their order."""

    queries: Tokens
    keys: Tokens
    packed: bool


def row_layout(
    segments: Int[Array, "B T"], branches: Int[Array, "B T"] | None, positions: Int[Array, "B T"]
) -> Layout:
    """Packed rows that attend to themselves, ordered by index."""
    shape = segments.shape
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 1, out_sharding=spec("BT"))
    tokens = Tokens(segments, branches, positions, index)
    tokens = jax.tree.map(lambda x: x.astype(jnp.int32), tokens)
    return Layout(tokens, tokens, packed=True)


def cache_layout(positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]) -> Layout:
    """New tokens that attend to a cache, ordered by position; -1 is padding, or an empty slot."""
    sides = (Tokens((at >= 0).astype(jnp.int32), None, at, at) for at in (positions, key_positions))
    return Layout(*sides, packed=False)


def visible(queries: Tokens, keys: Tokens, window: int | None) -> Bool[Array, "B T S"]:
    """True where a query (axis 1) sees a key (axis 2).

    With a window of W a query at p sees positions p-W+1 to p. Padding (segment 0) sees nothing and
    is seen by nothing. Example: a row with `segments=[[1, 1, 2, 0]]`, no branches, gives
    `[[1,0,0,0], [1,1,0,0], [0,0,1,0], [0,0,0,0]]`.
    """
    seen = queries.order[:, :, None] >= keys.order[:, None, :]
    document = keys.segments[:, None, :]
    seen &= (queries.segments[:, :, None] == document) & (document > 0)
    if queries.branches is not None and keys.branches is not None:
        branch = keys.branches[:, None, :]
        seen &= (branch == 0) | (branch == queries.branches[:, :, None])
    if window is not None:
        seen &= queries.positions[:, :, None] - keys.positions[:, None, :] < window
    return seen
