"""Attention by the Pallas kernel that ships with JAX for TPUs ("splash").

The kernel knows one document id per token, and a causal mask and a window by index. Both are
fitted to the rule here: rows with branches run it twice, and where the window is shorter than the
row, each document's shared prefix and the branch in question are first put side by side, so that
distances by index are distances by position. That holds for rows whose positions rise by one from
token to token of a prefix and of each branch behind it, as all packed rows of this project do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Int

from zephyr_jax.models.masks import Layout, Tokens, per_device

LANES = 128  # the kernel takes rows of a multiple of these
BLOCKS = (1024, 512, 256, LANES)  # tokens of a tile: the first that divides the row, and is no
# larger than the generation wants; 2,048 do not fit the vector memory of any (libtpu 0.0.42.1)
_LARGEST = {"TPU v5": 1024, "TPU v6 lite": 1024, "TPU7x": 1024}  # by kind; else 512


def splash_over(
    layout: Layout, window: int | None, *, interpret: bool
) -> Callable[[Array, Array, Array], Array]:
    """The attention `(q, k, v) -> B T K G H` of packed rows; padding attends to padding.

    Args:
        layout: of packed rows; without branches (None) the kernel runs once instead of twice.
        window: the keys a query sees, itself included.
        interpret: run the kernel's steps as ordinary JAX, on any device: for tests.
    """
    run = per_device(functools.partial(_splash, window, interpret), ("BTNGH", "BTNH", "BTNH", "BT"))
    return lambda q, k, v: run(q, k, v, layout.queries)


def _splash(window: int | None, interpret: bool, q: Array, k: Array, v: Array, tokens: Tokens):
    t, scale = q.shape[1], jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    window = None if window is not None and window >= t else window
    q, k, v, segments = (_filled(x) for x in (q * scale, k, v, tokens.segments))
    kernel = _kernel(q, window, interpret)
    if tokens.branches is None:
        return kernel(q, k, v, segments)[:, :t]
    branches = _filled(tokens.branches)

    def without(hidden: int) -> Array:
        # The hidden branch becomes a document of its own: queries that see no key would turn the
        # kernel's gradients into NaN.
        here = branches == hidden
        ids = 2 * segments + here
        if window is None:
            return kernel(q, k, v, ids)
        order = jnp.argsort(ids, axis=1, stable=True)  # the hidden branch behind all of the other
        moved = (_taken(x, order) for x in (q, k, v, ids))
        return _taken(kernel(*moved), jnp.argsort(order, axis=1))

    rejected = (branches == 2)[:, :, None, None, None]
    return jnp.where(rejected, without(1), without(2))[:, :t]


def _filled(x: Array) -> Array:
    """`x` with T filled up to the kernel's multiple by zeros, which is segment 0."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)) + ((0, 0),) * (x.ndim - 2))


def _taken(x: Array, order: Int[Array, "B T"]) -> Array:
    return jax.vmap(lambda row, at: row[at])(x, order)


def _device_kind() -> str:
    """The kind of the ambient mesh's devices, which may be abstract."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def _kernel(like: Array, window: int | None, interpret: bool):
    """`(q, k, v, ids) -> B T K G H`, q scaled already, for queries of this shape."""
    _, t, kv, g, h = like.shape
    shape = (t, t)
    mask = masks.CausalMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    largest = _LARGEST.get(_device_kind(), 512)
    size = next(size for size in BLOCKS if size <= largest and t % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * (kv * g)),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, size)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one(q, k, v, ids):
        q = q.transpose(1, 2, 0, 3).reshape(kv * g, t, h)
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        out = cast(Array, kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids)))
        return out.reshape(kv, g, t, h).transpose(2, 0, 1, 3)

    return jax.vmap(one)
