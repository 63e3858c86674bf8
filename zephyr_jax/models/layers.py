"""RMSNorm and RoPE, computed in float32, and the projections: pure functions of arrays."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from zephyr_jax import sharding
from zephyr_jax.sharding import axis_size, per_device, platform, reshard, spec, weight_spec


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """`x` divided by its root mean square along D, cast back, times `scale`; arXiv:1910.07467."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    # The value is that of a product in the dtype of `x`; the scale's gradient is a float32 sum.
    rounded, scale = (y.astype(x.dtype).astype(jnp.float32) for y in (normed, scale))
    return (rounded * scale[(None,) * (x.ndim - 1)]).astype(x.dtype)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosines and sines of p * theta^(-2i/head_dim), float32; Su et al. 2021, arXiv:2104.09864."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1) / np.float32(theta) ** exponent
    angles = positions.astype(jnp.float32)[..., None] * inverse[None, None]
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def rope(
    x: Float[Array, "B *K T H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B *K T H"]:
    """`x` rotated by its positions, pairing entry i with i + H/2, as in Hugging Face.

    The gradient is rotated back; the tables have none.
    """
    heads = tuple(range(1, x.ndim - 2))
    cos, sin = (jnp.expand_dims(jnp.tile(table, 2), heads) for table in (cos, sin))
    return (x.astype(jnp.float32) * cos + _quarter_turn(x) * sin).astype(x.dtype)


def _quarter_turn(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Entries i and i + H/2 become minus the second and the first, float32."""
    if platform() == "tpu":  # split and joined, a register's lanes would be copied one by one
        turn = np.kron([[0, 1], [-1, 0]], np.eye(x.shape[-1] // 2))
        turn = jnp.asarray(turn, x.dtype)  # each sum has one term, so the product is exact
        full = "highest" if x.dtype == jnp.float32 else None
        wide = jnp.float32
        return jnp.einsum("...H,HJ->...J", x, turn, precision=full, preferred_element_type=wide)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _rope_backward(tables: tuple[Array, Array], grad: Array):
    cos, sin = tables
    return rope(grad, cos, -sin), None, None


rope.defvjp(lambda x, cos, sin: (rope(x, cos, sin), (cos, sin)), _rope_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def linear(
    equation: str,
    x: Array,
    weight: Array,
    reduce_dtype: str = "float32",  # noqa: ARG001 (of the backward pass)
    out_dtype: str | None = None,
) -> Array:
    """`einsum(equation, x, weight)` in the dtype of `x`, sharded by its logical axes.

    Tokens are T, C or Z (zephyr_jax.sharding): "BZD,DF->BCF" gathers those of the residual stream,
    "BCF,FD->BZD" sums over devices only what each keeps. The weight is cast before it is gathered;
    its gradient is summed, also across devices, in `reduce_dtype`, and sharded like the weight.
    Products are accumulated in float32 and returned in `out_dtype` (None: that of `x`).
    """
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    # The TPU compiler would gather the weight chunk by chunk, in up to twice the cycles.
    return jnp.einsum(
        _unsharded_tokens(equation),
        _gather_tokens(x, x_axes, out),
        reshard(weight.astype(x.dtype), w_axes),
        preferred_element_type=jnp.dtype(out_dtype or x.dtype),
        out_sharding=spec(out),
    )


def token_axis(axes: str) -> str:
    """The logical axis of the tokens: T, C or Z."""
    return next(axis for axis in axes if axis in "TCZ")


def _unsharded_tokens(axes: str) -> str:
    return axes.replace("C", "T").replace("Z", "T")


def _gather_tokens(array: Array, axes: str, others: str) -> Array:
    """The array with its tokens gathered as far as those of the other array of a product are."""
    if "Z" not in axes or "Z" in others:
        return array
    return reshard(array, axes.replace("Z", token_axis(others)))


def _linear_forward(equation: str, x: Array, weight: Array, reduce_dtype: str, out_dtype):
    return linear(equation, x, weight, reduce_dtype, out_dtype), (x, weight)


def _linear_backward(equation: str, reduce_dtype: str, _, saved: tuple[Array, Array], grad: Array):
    x, weight = saved
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    grad = _gather_tokens(grad.astype(x.dtype), out, x_axes)
    dx = jnp.einsum(
        _unsharded_tokens(f"{out},{w_axes}->{x_axes}"),
        grad,
        reshard(weight.astype(x.dtype), w_axes),
        out_sharding=spec(x_axes),
    )
    # The TPU compiler transposes the operand whose axes come first in memory: the smaller one.
    turned = platform() == "tpu" and x.size > grad.size
    dw_axes = "".join(sorted(w_axes, key=lambda axis: axis in x_axes)) if turned else w_axes
    dw = jnp.einsum(
        _unsharded_tokens(f"{x_axes},{out}->{dw_axes}"),
        _gather_tokens(x, x_axes, out),
        grad,
        preferred_element_type=jnp.dtype(reduce_dtype),
        out_sharding=weight_spec(dw_axes),
    )
    if turned:
        dw = with_layout_constraint(dw, Layout(tuple(range(dw.ndim))))
        dw = dw.transpose([dw_axes.index(axis) for axis in w_axes])
    return dx, dw.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
@jax.named_scope("embed")
def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    dtype: str,
    reduce_dtype: str,  # noqa: ARG001 (of the backward pass)
    axes: str,
) -> Float[Array, "B T D"]:
    """The rows of `table` for these tokens, in `dtype`, sharded by the logical axes.

    The gradient of the table is added up in `reduce_dtype`: a token that occurs thousands of times
    in a batch would be lost in a bfloat16 sum.
    """
    # Gathering the table before the lookup saves the all-to-alls of a sharded lookup.
    whole, tokens = reshard(table.astype(dtype), ".."), reshard(tokens, axes[:-1])
    return whole.at[tokens].get(out_sharding=spec(axes))


def _embed_forward(table: Array, tokens: Array, dtype: str, reduce_dtype: str, axes: str):
    return embed(table, tokens, dtype, reduce_dtype, axes), (table, tokens)


@jax.named_scope("embedding_gradient")
def _embed_backward(_: str, reduce_dtype: str, axes: str, saved: tuple[Array, Array], grad: Array):
    table, tokens = saved
    # The tokens' gradients travel, a few megabytes; a sum of whole tables is half a gigabyte.
    over = sharding.axes_of("D", sharding.WEIGHT_RULES)
    held = table.shape[0] // axis_size("tensor"), table.shape[1] // axis_size(*over)

    def add(tokens: Array, grad: Array) -> Array:
        tokens, grad = tokens.reshape(-1), grad.reshape(-1, table.shape[1])
        if spec("") is not None:
            tokens = jax.lax.all_gather(tokens, over, tiled=True)
            grad = jax.lax.all_to_all(grad, over, split_axis=1, concat_axis=0, tiled=True)
            if "Z" in axes:
                tokens, grad = (jax.lax.all_gather(x, "tensor", tiled=True) for x in (tokens, grad))
            tokens = tokens - jax.lax.axis_index("tensor") * held[0]
        here = jnp.where(tokens >= 0, tokens, held[0])  # elsewhere: beyond the end, dropped
        rows = jnp.zeros(held, reduce_dtype).at[here].add(grad.astype(reduce_dtype), mode="drop")
        return rows if spec("") is None else jax.lax.psum(rows, "data")

    run = per_device(add, (axes[:-1], axes), weight_spec("VD"))
    return run(reshard(tokens, axes[:-1]), grad).astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


def embed_few(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """`embed` for the few tokens of a step of generation: the table stays sharded over `tensor`."""
    table = table if spec("") is None else jax.reshard(table, spec("V.", sharding.WEIGHT_RULES))
    return table.at[tokens].get(out_sharding=spec("BTD")).astype(dtype)
