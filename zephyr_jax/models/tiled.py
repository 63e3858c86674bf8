"""Attention in tiles: the scores of a block of queries and a block of keys at a time.

Memory grows with T, not with its square, and tiles in which no query sees a key cost next to
nothing. The backward pass recomputes the tiles: Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from zephyr_jax.models.masks import Attend, Layout, Tokens, visible
from zephyr_jax.sharding import per_device, spec

OUTPUT = "attention"  # in `train.remat`: what the backward pass of attention reads
TILE = 128  # queries, and keys, of a tile; twice as many in rows of more than 1,024 tokens
LEAST = -1e30  # below every score, and finite, so that a row without keys makes no NaN

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def tiled_over(layout: Layout, window: int | None) -> Attend:
    """The attention of this layout, tile by tile; a query that sees no key gets 0."""
    local, axes = functools.partial(_tiled_rows, window), ("BNGTH", "BNSH", "BNSH", "BT", "BS")
    run = per_device(local, axes, spec("BNGTH"))
    return lambda q, k, v: run(q, k, v, layout.queries, layout.keys)


def _tiled_rows(window: int | None, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens):
    b, kv, g, t, h = q.shape
    rows, columns = (min(n, TILE if n <= 1024 else 2 * TILE) for n in (t, k.shape[2]))
    q = _blocks(q, rows, 3).reshape(-1, b, kv, g * rows, h)
    k, v = (_blocks(x, columns, 2) for x in (k, v))
    queries = jax.tree.map(lambda x: _blocks(x, rows, 1), queries)
    keys = jax.tree.map(lambda x: _blocks(x, columns, 1), keys)
    out: Any = _tiled(window, q, k, v, queries, keys)
    out = jnp.moveaxis(out.reshape(-1, b, kv, g, rows, h), 0, 3)
    return out.reshape(b, kv, g, -1, h)[..., :t, :]


def _blocks(x: Array, size: int, axis: int) -> Array:
    """The axis cut into blocks on a new first axis, filled up with zeros: segment 0, not seen."""
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = jnp.pad(x, [(0, -length % size if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*before, -1, size, *after), axis, 0)


def _scores(q: Float[Array, "B K R H"], k: Float[Array, "B K S H"], seen: Bool[Array, "B T S"]):
    """Scaled scores `B K R S`, float32, -inf where the key is not seen; R = G T."""
    scores = product("BKRH,BKSH->BKRS", q, k)
    grouped = scores.reshape(*scores.shape[:2], -1, *seen.shape[1:]) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(window: int | None, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens):
    return _forward(window, q, k, v, queries, keys)[0]


def _forward(window: int | None, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens):
    """The output `N B K R H` in the dtype of q, and what the backward pass needs."""

    def row(_, block):
        q_i, at_i = block

        def add(carry, k_j, v_j, seen):
            top, total, out = carry
            scores = _scores(q_i, k_j, seen)
            higher = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            more = product("BKRS,BKSH->BKRH", weights.astype(v_j.dtype), v_j)
            total = total * shrink + weights.sum(axis=-1)
            return higher, total, out * shrink[..., None] + more

        def column(carry, block):
            k_j, v_j, at_j = block
            seen = visible(at_i, at_j, window)
            return jax.lax.cond(
                seen.any(), add, lambda carry, *_: carry, carry, k_j, v_j, seen
            ), None

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = zeros[..., 0] + LEAST, zeros[..., 0], zeros
        (top, total, out), _ = jax.lax.scan(column, start, (k, v, keys))
        safe = jnp.where(total > 0, total, 1.0)
        return None, ((out / safe[..., None]).astype(q.dtype), top + jnp.log(safe))

    _, (out, logsumexp) = jax.lax.scan(row, None, (q, queries))
    out, logsumexp = checkpoint_name(out, OUTPUT), checkpoint_name(logsumexp, OUTPUT)
    return out, (q, k, v, queries, keys, out, logsumexp)


def _backward(window: int | None, saved: Any, grad: Array):
    q, k, v, queries, keys, out, logsumexp = saved
    carried = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def row(sums, block):
        q_i, at_i, grad_i, carried_i, logsumexp_i = block

        def gradients(k_j, v_j, seen):
            weights = jnp.exp(_scores(q_i, k_j, seen) - logsumexp_i[..., None])
            dv = product("BKRS,BKRH->BKSH", weights.astype(q.dtype), grad_i)
            dweights = product("BKRH,BKSH->BKRS", grad_i, v_j)
            dscores = weights * (dweights - carried_i[..., None]) * q.shape[-1] ** -0.5
            dscores = dscores.astype(q.dtype)
            dk = product("BKRS,BKRH->BKSH", dscores, q_i)
            return product("BKRS,BKSH->BKRH", dscores, k_j), dk, dv

        def nothing(k_j, v_j, _):
            return tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_i, k_j, v_j))

        def column(sums, block):
            dq, dk, dv = sums
            j, k_j, v_j, at_j = block
            seen = visible(at_i, at_j, window)
            more = jax.lax.cond(seen.any(), gradients, nothing, k_j, v_j, seen)
            return (dq + more[0], dk.at[j].add(more[1]), dv.at[j].add(more[2])), None

        start = jnp.zeros(q_i.shape, jnp.float32), *sums
        (dq, *sums), _ = jax.lax.scan(column, start, (jnp.arange(len(k)), k, v, keys))
        return tuple(sums), dq.astype(q.dtype)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(row, start, (q, queries, grad, carried, logsumexp))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_tiled.defvjp(_forward, _backward)
