"""Rows for the tests of attention, and attention in float64 NumPy, from the rule's own words."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np

from zephyr_jax.models.attention import attention_over
from zephyr_jax.models.masks import row_layout
from zephyr_jax.sharding import named_sharding, spec

AXES = ("BKGTH", "BKSH", "BKSH", "BKGTH")  # of queries, keys, values and the output's cotangent


class Case(NamedTuple):
    """What decides who may see whom, int32 `B T`."""

    segments: np.ndarray
    branches: np.ndarray
    positions: np.ndarray


def pair(prompt: int, chosen: int, rejected: int) -> list[tuple[int, int]]:
    """(branch, position) of each token of a preference pair."""
    out = [(0, p) for p in range(prompt)]
    return out + [(b, prompt + i) for b, n in ((1, chosen), (2, rejected)) for i in range(n)]


def dialogue(n: int) -> list[tuple[int, int]]:
    """(branch, position) of each token of a document without branches."""
    return pair(n, 0, 0)


def packed(rows: list[list[list[tuple[int, int]]]], t: int) -> Case:
    """Rows of documents, filled up to `t` with padding."""
    out = np.zeros((3, len(rows), t), np.int32)
    for i, documents in enumerate(rows):
        at = 0
        for k, document in enumerate(documents):
            for branch, position in document:
                out[:, i, at] = k + 1, branch, position
                at += 1
    return Case(*out)


def pairs_and_padding(t: int) -> Case:
    """Pairs behind other documents, a row that one document fills, and one of padding alone."""
    mixed = [dialogue(t // 5), pair(t // 4, t // 8, t // 5)]
    several = [pair(t // 4, t // 8, t // 9), pair(0, 3, 2), pair(t // 6, 1, t // 7)]
    return packed([mixed, several, [], [pair(t - 2 * (t // 3), t // 3, t // 3)]], t)


def dialogues_and_padding(t: int) -> Case:
    """Several dialogues a row, one a row, one token, and padding alone."""
    several = [dialogue(t // 3), dialogue(t // 2)], [dialogue(1), dialogue(t // 4)]
    return packed([several[0], [dialogue(t)], [], several[1]], t)


def table(case: Case, window: int | None) -> np.ndarray:
    """`B T T`: same document, not later, in the prompt or the own branch, inside the window."""
    seen = np.zeros((*case.segments.shape, case.segments.shape[1]), bool)
    for row, query, key in np.ndindex(seen.shape):
        segments, branches, positions = (x[row] for x in case)
        same_document = segments[query] == segments[key] and segments[key] != 0
        own = branches[key] == 0 or branches[key] == branches[query]
        near = window is None or positions[query] - positions[key] < window
        seen[row, query, key] = same_document and key <= query and own and near
    return seen


def reference(q, k, v, mask, cotangent):
    """Attention `B K G T H` and its gradients for q, k, v, in float64; 0 where no key is seen."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scores = np.einsum("bkgth,bksh->bkgts", q, k) / np.sqrt(q.shape[-1])
    mask = mask[:, None, None]
    top = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(mask, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("bkgts,bksh->bkgth", weights, v)
    dv = np.einsum("bkgts,bkgth->bksh", weights, cotangent)
    dweights = np.einsum("bkgth,bksh->bkgts", cotangent, v)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    dscores /= np.sqrt(q.shape[-1])
    dq = np.einsum("bkgts,bksh->bkgth", dscores, k)
    return out, dq, np.einsum("bkgts,bkgth->bksh", dscores, q), dv


def attention(q, k, v, layout, window, implementation):
    """The attention of these arrays."""
    return attention_over(layout, window, implementation, q.shape[-1], str(q.dtype))(q, k, v)


def inputs(b, t, kv=2, g=2, h=12, s=None):
    """q, k, v and a cotangent of the output."""
    shapes = (b, kv, g, t, h), (b, kv, s or t, h), (b, kv, s or t, h), (b, kv, g, t, h)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, n) for k, n in zip(keys, shapes, strict=True)]


def layout_of(case, branched=True):
    """The layout of the rows on the ambient mesh."""
    segments, branches, positions = jax.device_put(tuple(case), named_sharding(spec("BT")))
    return row_layout(segments, branches if branched else None, positions)


def results(run, arrays, layout):
    """`run(layout)(q, k, v)`, and the gradients of its product with the cotangent."""
    arrays = jax.device_put(tuple(arrays), tuple(named_sharding(spec(axes)) for axes in AXES))

    @jax.jit
    def both(q, k, v, cotangent, queries, keys):
        attend = run(layout._replace(queries=queries, keys=keys))
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    return jax.device_get(both(*arrays, layout.queries, layout.keys))


def named(implementation, window):
    """The attention of that name, as `results` takes it."""
    options = {"window": window, "implementation": implementation}
    return lambda layout: functools.partial(attention, layout=layout, **options)


def check(run, arrays, layout, mask, real):
    """Against float64, at the queries `B T` that are real; the others get no cotangent."""
    real = real[:, None, None, :, None]
    *arrays, cotangent = (np.asarray(x) for x in arrays)
    cotangent = cotangent * real
    got, *grads = results(run, (*arrays, cotangent), layout)
    want = reference(*arrays, mask, cotangent)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (got * real, *grads), want, strict=True):
        # sums of up to 150 products of numbers of size 1; the largest error seen is 2.4e-6
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6, err_msg=name)


def check_rows(run, case, window, *, branched=True, **shape):
    """`check` of packed rows."""
    arrays, layout = inputs(*case.segments.shape, **shape), layout_of(case, branched)
    check(run, arrays, layout, table(case, window), case.segments > 0)


def shapes(t, head_dim, dtype):
    """Queries, keys, values, segments, branches and positions `4 t` to trace on the mesh."""

    def shape(sizes, axes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=named_sharding(spec(axes)))

    wide = (4, 2, 4, t, head_dim), (4, 2, t, head_dim), (4, 2, t, head_dim)
    arrays = [shape(sizes, axes, dtype) for sizes, axes in zip(wide, AXES[:3], strict=True)]
    return *arrays, *[shape((4, t), "BT", "int32")] * 3
