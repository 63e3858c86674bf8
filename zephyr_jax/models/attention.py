"""Which key a query sees, and the attention over those keys.

One rule serves every layout (see zephyr_jax.types.Rows): a query sees a key iff both belong to
the same document, the key is not later in the row, the key is in the trunk or in the query's own
branch, and it lies inside the sliding window *by position*.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def row_mask(
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    window: int | None,
) -> Bool[Array, "B T T"]:
    """True where query t (axis 1) sees key s (axis 2) of the same packed row.

    With a window of W a query sees at most W keys, itself included: positions p-W+1 to p. Padding
    (segment 0) sees nothing and is seen by nothing.

    Example: `segments=[[1, 1, 2, 0]]`, one trunk each, gives
    `[[1,0,0,0], [1,1,0,0], [0,0,1,0], [0,0,0,0]]`.
    """
    index = jnp.arange(segments.shape[1])
    visible = index[None, :, None] >= index[None, None, :]
    visible &= (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    branch = branches[:, None, :]
    visible &= (branch == 0) | (branch == branches[:, :, None])
    if window is not None:
        visible &= positions[:, :, None] - positions[:, None, :] < window
    return visible


def cache_mask(
    positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """True where a query sees a cached key; slots that hold nothing have position -1."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = (key_positions[:, None, :] >= 0) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


@jax.checkpoint
def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """Softmax attention with grouped queries; the dtype of `q`, scores and softmax in float32.

    A query that sees no key gets the mean of all values: finite, with finite gradients, and never
    read. The groups are folded into the rows, which is several times faster on CPU than the
    einsum over five axes. The backward pass computes the weights anew: writing and reading T x T
    arrays of all layers takes longer than that, and the memory.
    """
    b, t, kv, g, h = q.shape
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, kv, g * t, h)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv, g, t, -1) * h**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b, kv, g * t, -1)
    out = jnp.einsum("BKRS,BKSH->BKRH", weights, values)
    return out.reshape(b, kv, g, t, h).transpose(0, 3, 1, 2, 4)
