"""Attention behind one signature, with an implementation for every kind of machine.

`einsum` is the reference; `tiled` works tile by tile, on any machine; `splash` is the Pallas kernel
for TPUs, `cudnn` NVIDIA's. zephyr_jax.models.masks defines which keys a query sees; if there are
none, the result is finite and unused.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zephyr_jax.config.run import ATTENTION
from zephyr_jax.models.masks import Layout, per_device, visible
from zephyr_jax.models.splash import splash_over
from zephyr_jax.models.tiled import tiled_over
from zephyr_jax.sharding import axes_of, axis_size, reshard

Attend = Callable[[Array, Array, Array], Array]  # q `B T K G H`, k and v `B S K H` -> like q

# Queries and keys from which on `tiled` is the faster one on a 2-core CPU, forward and backward: as
# fast as `einsum` at 256 tokens, 1.0 to 3 times at 384, 1.7 to 2.6 at 512, 3 to 5 from 1,024 on.
TILED_FROM = 384


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    layout: Layout,
    window: int | None,
    implementation: str = "auto",
) -> Float[Array, "B T K G H"]:
    """Softmax attention with grouped queries; the dtype of `q`, scores and softmax in float32."""
    return attention_over(layout, window, implementation, q.shape[-1], str(q.dtype))(q, k, v)


def attention_over(
    layout: Layout, window: int | None, implementation: str, head_dim: int, dtype: str
) -> Attend:
    """The attention of every layer of a forward pass; their common mask is computed here, once.

    Args:
        layout: which tokens are queries and keys.
        window: how many keys a query sees by position, itself included; None: all.
        implementation: one of config.ATTENTION. "auto": splash on TPU, cudnn on GPU where it can,
            elsewhere einsum for short rows and tiled for long ones.
        head_dim: H.
        dtype: of q, k and v.

    Raises:
        ValueError: if the implementation is unknown, or not possible here.
    """
    if implementation == "auto":
        implementation = auto(layout, head_dim, dtype)
    return _over_heads(_implementation(layout, window, implementation, head_dim, dtype))


def auto(layout: Layout, head_dim: int, dtype: str) -> str:
    """The implementation that "auto" stands for here."""
    if platform() == "tpu" and layout.packed:
        return "splash"
    if platform() == "gpu" and not _unfit_for_cudnn(layout, head_dim, dtype):
        return "cudnn"
    sizes = layout.queries.segments.shape[1], layout.keys.segments.shape[1]
    return "tiled" if min(sizes) >= TILED_FROM else "einsum"


def _implementation(
    layout: Layout, window: int | None, implementation: str, head_dim: int, dtype: str
) -> Attend:
    here = platform()
    match implementation:
        case "einsum":
            mask = visible(layout.queries, layout.keys, window)
            return lambda q, k, v: attend(q, k, v, mask)
        case "tiled":
            return tiled_over(layout, window)
        case "splash":
            if not layout.packed or here == "gpu":
                raise ValueError(
                    "attention='splash' is for packed rows on TPU (interpreted on CPU); use 'auto'"
                )
            return splash_over(layout, window, interpret=here != "tpu")
        case "cudnn":
            unfit = _unfit_for_cudnn(layout, head_dim, dtype)
            if unfit or here != "gpu":
                raise ValueError(
                    f"attention='cudnn' is for NVIDIA GPUs; here: {unfit or here}; use 'auto'"
                )
            return cudnn_over(layout, window)
    names = ", ".join(ATTENTION)
    raise ValueError(f"attention={implementation!r} is not known; use one of {names}")


def _over_heads(attend: Attend) -> Attend:
    """The attention of tokens that are sharded over `context`, with their heads sharded instead.

    Every device gets complete rows and some of the heads (Jacobs et al. 2023, arXiv:2309.14509).
    """
    over = axes_of("N")
    if "context" not in over:
        return attend

    def run(q: Array, k: Array, v: Array) -> Array:
        if k.shape[2] % axis_size(*over):
            raise ValueError(
                f"num_key_value_heads={k.shape[2]} is not divisible by mesh.tensor x mesh.context "
                f"= {axis_size(*over)}, over which attention shards the heads; use smaller ones"
            )
        moved = reshard(q, "BTNGH"), reshard(k, "BSNH"), reshard(v, "BSNH")
        return jax.reshard(attend(*moved), jax.typeof(q).sharding.spec)

    return run


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the platform of the ambient mesh's devices, which may be abstract."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@jax.checkpoint
def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """The reference: all scores at once. A query that sees no key gets the mean of all values.

    The groups are folded into the rows, which is several times faster on CPU than the einsum over
    five axes. The backward pass recomputes the weights, which is faster than writing and reading
    T x T arrays of all layers, and saves memory.
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


def cudnn_over(layout: Layout, window: int | None, kernel: str = "cudnn") -> Attend:
    """The attention by `jax.nn.dot_product_attention`, whose mask is the complete rule.

    Args:
        layout: which tokens are queries and keys.
        window: how many keys a query sees by position, itself included; None: all.
        kernel: JAX's name; "xla" is the same call without a GPU, for tests.
    """
    mask = visible(layout.queries, layout.keys, window)

    def run(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # Passed in addition to the mask, so that the kernel skips later keys.
        causal = {"is_causal": layout.packed, "implementation": kernel}
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
        out = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], **causal)
        return out.reshape(q.shape)

    shards = per_device(run, ("BTNGH", "BSNH", "BSNH", "BTS"))
    return lambda q, k, v: shards(q, k, v, mask)


def _unfit_for_cudnn(layout: Layout, head_dim: int, dtype: str) -> str:
    """Why cuDNN cannot do it; empty if it can."""
    if dtype not in ("bfloat16", "float16"):
        return f"dtype {dtype} is not bfloat16 or float16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim {head_dim} is not a multiple of 8 up to 128"
    odd = layout.queries.segments.shape[1] % 2 or layout.keys.segments.shape[1] % 2
    return "an odd number of tokens in a row" if odd else ""
