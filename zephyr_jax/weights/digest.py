"""A digest of parameters, the same on every mesh."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp

from zephyr_jax.types import Params


@jax.jit
def _fold(leaf: jax.Array) -> jax.Array:
    """Two 32-bit sums over the raw bits, each entry times an odd number of its index.

    Integer sums do not depend on the order of addition, so nor on how the leaf is sharded.
    """
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        shape = tuple(size if i == axis else 1 for i in range(leaf.ndim))
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    mixed = bits ^ (bits >> 15)
    first = (bits * (2 * index + 1)).sum(dtype=jnp.uint32)
    return jnp.stack([first, (mixed * (index * jnp.uint32(2654435761) | 1)).sum(dtype=jnp.uint32)])


def params_digest(params: Params) -> str:
    """A sha256 over every parameter's path, shape and bits, the same on every mesh."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    folds = jax.device_get([_fold(leaf) for _, leaf in leaves])
    folded = [
        (jax.tree_util.keystr(path), list(leaf.shape), [int(x) for x in fold])
        for (path, leaf), fold in zip(leaves, folds, strict=True)
    ]
    return hashlib.sha256(json.dumps(folded).encode()).hexdigest()
