"""Softmax attention with grouped queries, with an implementation for every kind of machine.

`einsum` is the reference; `tiled` works tile by tile, on any machine; `splash` is the Pallas kernel
for TPUs that ships with JAX, `cudnn` NVIDIA's. Scores and softmax are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jaxtyping import Array, Bool, Float, Int

from zephyr_jax import sharding
from zephyr_jax.config import choose
from zephyr_jax.config.run import ATTENTION, MistralConfig
from zephyr_jax.models.masks import Attend, Layout, Tokens, cache_layout, visible
from zephyr_jax.models.tiled import OUTPUT, tiled_over
from zephyr_jax.sharding import axis_size, per_device, platform, reshard, spec

# Queries and keys from which on `tiled` is the faster one on a 2-core CPU, forward and backward: as
# fast as `einsum` at 256 tokens, 1.0 to 3 times at 384, 1.7 to 2.6 at 512, 3 to 5 from 1,024 on.
TILED_FROM = 384
LANES = 128  # splash takes rows of a multiple of these
# Tokens of a tile of splash: the first that divides the row and suits the generation; 2,048 do not
# fit the vector memory of any (libtpu 0.0.42.1).
BLOCKS = (1024, 512, 256, LANES)
# Of a token in a row with branches: three numbers are packed in the 32 that splash has for a query.
_INDEX_BITS = 11
ONE_CALL = 1 << _INDEX_BITS  # tokens of the longest row with branches that splash runs over once
_LAST = ONE_CALL - 1
_LARGEST = {"TPU v5": 1024, "TPU v6 lite": 1024, "TPU7x": 1024}  # by kind; else 512


def attention_over(
    layout: Layout, window: int | None, implementation: str, head_dim: int, dtype: str
) -> Attend:
    """The attention of all layers, whose mask is computed once; a ValueError if impossible here."""
    choose("attention", implementation, ATTENTION)
    if implementation == "auto":
        implementation = auto(layout, head_dim, dtype)
    here = platform()
    if implementation == "splash" and (not layout.packed or here == "gpu"):
        raise ValueError(
            "attention='splash' is for packed rows on TPU (interpreted on CPU); use 'auto'"
        )
    if implementation == "cudnn" and (here != "gpu" or not _suits_cudnn(layout, head_dim, dtype)):
        raise ValueError(
            "attention='cudnn' is for NVIDIA GPUs, bfloat16 or float16, an even number of tokens "
            "in a row, and a head_dim that is a multiple of 8 up to 128; here: "
            f"{here}, {dtype}, head_dim {head_dim}; use 'auto'"
        )
    match implementation:
        case "einsum":
            mask = visible(layout.queries, layout.keys, window)
            run = _named(functools.partial(attend, mask=mask))
        case "tiled":
            run = tiled_over(layout, window)
        case "splash":
            run = splash_over(layout, window, interpret=here != "tpu")
        case _:
            run = _named(cudnn_over(layout, window))
    return _over_heads(run)


def _named(run: Attend) -> Attend:
    """`run` with the name of its output; tiled and splash name what their backward pass reads."""
    return lambda q, k, v: checkpoint_name(run(q, k, v), OUTPUT)


def auto(layout: Layout, head_dim: int, dtype: str) -> str:
    """Splash on TPU, cudnn on GPU if it suits, else einsum for short rows and tiled for long."""
    if platform() == "tpu" and layout.packed:
        return "splash"
    if platform() == "gpu" and _suits_cudnn(layout, head_dim, dtype):
        return "cudnn"
    sizes = layout.queries.segments.shape[1], layout.keys.segments.shape[1]
    return "tiled" if min(sizes) >= TILED_FROM else "einsum"


def _over_heads(attend: Attend) -> Attend:
    """The attention of tokens sharded over `context`, with their heads sharded instead."""
    over = sharding.axes_of("N")  # Jacobs et al. 2023, arXiv:2309.14509
    if "context" not in over:
        return attend

    def run(q: Array, k: Array, v: Array) -> Array:
        if k.shape[1] % axis_size(*over):
            raise ValueError(
                f"num_key_value_heads={k.shape[1]} is not divisible by mesh.tensor x mesh.context "
                f"= {axis_size(*over)}, over which attention shards the heads; use smaller ones"
            )
        moved = reshard(q, "BNGTH"), reshard(k, "BNSH"), reshard(v, "BNSH")
        return jax.reshard(attend(*moved), jax.typeof(q).sharding.spec)

    return run


@jax.checkpoint
def attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B K G T H"]:
    """The reference: all scores at once. A query that sees no key gets the mean of all values.

    Groups are folded into the rows, which is several times faster on CPU. The backward pass
    recomputes the weights, faster than reading T x T arrays of all layers.
    """
    b, kv, g, t, h = q.shape
    rows = q.reshape(b, kv, g * t, h)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv, g, t, -1) * h**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b, kv, g * t, -1)
    return jnp.einsum("BKRS,BKSH->BKRH", weights, v).reshape(q.shape)


def cached_attention(
    positions: Int[Array, "B T"], cached: Int[Array, "B S"] | None, cfg: MistralConfig
) -> Callable[[Array, Array, Array, Array, Array], Array]:
    """The attention of new tokens `(q, k, v, cached k, cached v)` to a cache and to themselves.

    `cached` are the positions in the cache; None: it is empty. Slots that the new tokens will take
    hold nothing, or what is outside of their windows.
    """
    window = cfg.sliding_window
    if cached is None or positions.shape[1] > 1:
        keys = [positions] if cached is None else [cached, positions]
        layout = cache_layout(positions, jnp.concatenate(keys, axis=1))
        attend_all = attention_over(layout, window, "auto", cfg.head_dim, cfg.dtype)
        if cached is None:
            return lambda q, k, v, *_: attend_all(q, k, v)
        join = functools.partial(jnp.concatenate, axis=2)
        return lambda q, k, v, k0, v0: attend_all(q, join([k0, k]), join([v0, v]))
    layouts = [cache_layout(positions, keys) for keys in (cached, positions)]
    masks = [visible(layout.queries, layout.keys, window) for layout in layouts]

    def run(q: Array, k: Array, v: Array, k0: Array, v0: Array) -> Array:
        # One softmax over both, so that the cache is read where it lies.
        b, kv, g, t, h = q.shape
        rows, least = q.reshape(b, kv, g * t, h), jnp.finfo(jnp.float32).min
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = [product("BKRH,BKSH->BKRS", rows, keys) * h**-0.5 for keys in (k0, k)]
        pairs = zip(scores, masks, strict=True)
        scores = [jnp.where(mask[:, None], x, least) for x, mask in pairs]
        largest = jnp.maximum(*(x.max(axis=-1, keepdims=True) for x in scores))
        old, new = (jnp.exp(x - largest) for x in scores)
        out = product("BKRS,BKSH->BKRH", old.astype(q.dtype), v0)
        out += product("BKRS,BKSH->BKRH", new.astype(q.dtype), v)
        total = old.sum(axis=-1, keepdims=True) + new.sum(axis=-1, keepdims=True)
        return (out / total).astype(q.dtype).reshape(q.shape)

    return run


def cudnn_over(layout: Layout, window: int | None, kernel: str = "cudnn") -> Attend:
    """`jax.nn.dot_product_attention` under the mask; the kernel "xla" needs no GPU, for tests."""
    mask = visible(layout.queries, layout.keys, window)

    def run(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # Passed in addition to the mask, so that the kernel skips later keys.
        causal = {"is_causal": layout.packed, "implementation": kernel}
        heads = (x.reshape(x.shape[0], -1, *x.shape[-2:]).swapaxes(1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(*heads, mask=mask[:, None], **causal)
        return out.swapaxes(1, 2).reshape(q.shape)

    shards = per_device(run, ("BNGTH", "BNSH", "BNSH", "BTS"), spec("BNGTH"))
    return lambda q, k, v: shards(q, k, v, mask)


def _suits_cudnn(layout: Layout, head_dim: int, dtype: str) -> bool:
    even = all(tokens.segments.shape[1] % 2 == 0 for tokens in (layout.queries, layout.keys))
    return dtype in ("bfloat16", "float16") and head_dim in range(8, 129, 8) and even


def splash_over(layout: Layout, window: int | None, *, interpret: bool) -> Attend:
    """The attention of packed rows by the Pallas kernel; padding attends to padding.

    The kernel knows one document id per token, and computes a causal mask and a window by index; in
    rows with branches of at most 2,048 tokens a mask that hides the branches before each query's
    own. Longer rows of pairs run it twice, and so do those with a shorter window, in which a prompt
    and the branch in question are first moved together. `interpret` is ordinary JAX, for tests.
    """
    local = functools.partial(_splash, window, interpret)
    run = per_device(local, ("BNGTH", "BNTH", "BNTH", "BT"), spec("BNGTH"))
    return lambda q, k, v: run(q, k, v, layout.queries)


def _splash(window: int | None, interpret: bool, q: Array, k: Array, v: Array, tokens: Tokens):
    t, scale = q.shape[-2], jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    window = None if window is not None and window >= t else window
    q, k, v = (_filled(x, -2) for x in (q, k * scale, v))  # there are fewer keys than queries
    segments = _filled(tokens.segments, -1)
    kernel = _kernel(q, window, interpret)
    if tokens.branches is None:
        return kernel(q, k, v, segments)[..., :t, :]
    branches = _filled(tokens.branches, -1)
    if window is None and q.shape[-2] <= ONE_CALL:
        return kernel(q, k, v, segments, _hidden(segments, branches))[..., :t, :]

    def without(hidden: int) -> Array:
        # The hidden branch becomes a document of its own: queries that see no key would turn the
        # kernel's gradients into NaN.
        ids = 2 * segments + (branches == hidden)
        if window is None:
            return kernel(q, k, v, ids)
        order = jnp.argsort(ids, axis=1, stable=True)  # the hidden branch behind all of the other
        moved = [_taken(x, order) for x in (q, k, v)]
        moved.append(jnp.take_along_axis(ids, order, axis=1))
        return _taken(kernel(*moved), jnp.argsort(order, axis=1))

    rejected = (branches == 2)[:, None, None, :, None]
    return jnp.where(rejected, without(1), without(2))[..., :t, :]


def _hidden(segments: Int[Array, "B T"], branches: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each query's index and where the branches before its own lie, in one integer, for `_sees`.

    They end `near` + 1 tokens before the query, and have `length` tokens together, or none. Behind
    a shared token both are less than 2^11 - 1 in all, so that 21 bits hold them: for long branches
    both are subtracted from 2^11 - 1, which makes their sum larger than that.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)

    def start(branch: Array) -> Array:  # of the part of a document that the query is in
        new = (jnp.diff(segments, prepend=-1) != 0) | (jnp.diff(branch, prepend=-1) != 0)
        return jax.lax.cummax(jnp.where(new, index, 0), axis=1)

    own, answers = start(branches), start(jnp.minimum(branches, 1))
    near, length = index - own, own - answers
    turn = (length >> _INDEX_BITS - 1) * _LAST  # x ^ _LAST is _LAST - x
    return index | (near ^ turn) << _INDEX_BITS | (length ^ turn) << 2 * _INDEX_BITS


def _sees(queries: Any, keys: Any) -> Any:
    """Whether queries, as `_hidden` describes them, see keys, by index; part of the kernel."""
    near, length = queries >> _INDEX_BITS & _LAST, queries >> 2 * _INDEX_BITS & _LAST >> 1
    turn = (near + length >> _INDEX_BITS) * _LAST
    near, length = near ^ turn, length ^ turn
    back = (queries & _LAST) - keys
    return (back >= 0) & ((back <= near) | (back > near + length))


def _filled(x: Array, axis: int) -> Array:
    """`x` with its axis of tokens filled up to the kernel's multiple by zeros: segment 0."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths)


def _taken(x: Float[Array, "B *K T H"], order: Int[Array, "B T"]) -> Float[Array, "B *K T H"]:
    return jax.vmap(lambda row, at: jnp.take(row, at, axis=-2))(x, order)


def _kernel(like: Array, window: int | None, interpret: bool):
    """`(q, k, v, ids) -> B K G T H`, k scaled already, for queries of this shape."""
    _, kv, g, t, h = like.shape
    mask = splash_masks.CausalMask((t, t))
    if window is not None:
        mask = splash_masks.LocalMask((t, t), (window - 1, 0), 0)
    largest = _LARGEST.get(sharding.device_of_mesh().device_kind, 512)
    size = next(size for size in BLOCKS if size <= largest and t % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    blocks: dict[str, Any] = dict.fromkeys(names, size)
    blocks["q_layout"] = kernels.QKVLayout.SEQ_MINOR  # as the projection leaves the queries
    kernel = kernels.make_splash_mha(
        splash_masks.MultiHeadMask([mask] * (kv * g)),
        block_sizes=kernels.BlockSizes(**blocks),
        residual_checkpoint_name=OUTPUT,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one(q, k, v, ids, hidden=None):
        run = kernel
        if hidden is not None:
            infos: Any = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
            own = (info._replace(q_sequence=hidden) for info in infos)
            run = kernels.SplashAttentionKernel(*own, **kernel.kwargs | {"mask_function": _sees})
        q = q.reshape(kv * g, t, h)
        out = cast(Array, run(q, k, v, segment_ids=kernels.SegmentIds(ids, ids)))
        return out.reshape(kv, g, t, h)

    return jax.vmap(one)
