"""Frozen projections in 4 or 8 bits, for adapters beside them (QLoRA; arXiv:2305.14314).

A weight is cut into blocks of 64 values along an axis that it contracts. Of a block one float32
scale is kept, and of each value a small code: the nearest of 16 quantiles of a normal distribution
(nf4, two codes in a byte), or of 255 even steps (int8). A layer makes its weights from the codes
where it uses them, in the backward pass anew, so that no more than one is there in full.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.models.layers import linear
from zephyr_jax.models.parameters import PARAM_AXES, param_shapes
from zephyr_jax.sharding import WEIGHT_RULES, axes_of, axis_size, spec, weight_spec
from zephyr_jax.types import Params

BLOCK, _SMALLEST = 64, 16  # values under one scale; below the smallest, scales outweigh the codes


def _nf4() -> tuple[float, ...]:
    """The 16 values of nf4: seven quantiles below zero, zero, and eight above it, within [-1, 1].

    The outermost probability is the mean of those at which 15 and 16 even bins have their outermost
    middles, as in the paper.
    """
    last = 1 - (1 / 30 + 1 / 32) / 2
    side = {
        n: [statistics.NormalDist().inv_cdf(last + i / n * (0.5 - last)) for i in range(n)]
        for n in (7, 8)
    }
    below, above = [-x / side[7][0] for x in side[7]], [x / side[8][0] for x in side[8]]
    return (*below, 0.0, *reversed(above))


NF4 = _nf4()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as codes and scales; axis `axis` of both counts the values of a block.

    Where the weight has an axis of D values, the codes have D / 64 blocks and a block's 64 values
    (nf4: 32 bytes, whose low halves are the first 32), and the scales D / 64 and 1.
    """

    codes: Array  # int8; nf4: uint8
    scales: Array  # float32
    axis: int = dataclasses.field(metadata={"static": True})  # from the end, so also of one layer

    def __getitem__(self, index: Any) -> Quantized:
        """The part that `index` selects of the leading axes."""
        return cast(Quantized, jax.tree.map(lambda x: x[index], self))


def _blocked(axes: str, sizes: tuple[int, ...], name: str = "a weight") -> tuple[int, int]:
    """The axis that blocks lie along, counted from the end, and how many values a block has.

    Axes are divided over a mesh block by block, so this one must have room for that.
    """
    letters = axes.split()
    axis = -2 if letters[-1] == "D" else letters.index("D") - len(letters)
    size, letter = sizes[axis], letters[axis]
    block = math.gcd(BLOCK, size)
    if block < _SMALLEST:
        raise ValueError(
            f"axis {letter}={size} of {name} has blocks of {block} for quantizing, {_SMALLEST} are "
            f"the fewest; use a multiple of {_SMALLEST}, or lora.base=full"
        )
    over = axes_of(letter, WEIGHT_RULES)
    if (size // block) % axis_size(*over):
        said = " x ".join(over)
        raise ValueError(
            f"axis {letter}={size} of {name} has {size // block} blocks of {block} for quantizing, "
            f"which {said}={axis_size(*over)} does not divide; use another {said}, or "
            "lora.base=full"
        )
    return axis, block


def _projections(cfg: MistralConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what is quantized: matrices of the layers."""
    shapes = param_shapes(cfg)
    return {path: shapes[path] for path in shapes if path.count("/") == 2}


def check_blocks(cfg: MistralConfig) -> None:
    """Raises a ValueError where a projection cannot be cut into blocks on the ambient mesh."""
    for path, shape in _projections(cfg).items():
        _blocked(PARAM_AXES[path], shape, path)


def quantize(array: Float[Array, ...], axes: str, kind: str) -> Quantized:
    """Codes and scales of a weight, divided over the mesh like it.

    Args:
        array: the weight.
        axes: its axis letters, "L D K G H". Blocks lie along D, or where that is written, before.
        kind: "int8" or "nf4".

    Raises:
        ValueError: if the blocked axis does not come in blocks of 16 to 64, or not for the mesh.
    """
    axis, block = _blocked(axes, array.shape)
    at = array.ndim + axis
    shape = (*array.shape[:at], array.shape[at] // block, block, *array.shape[at + 1 :])
    letters = axes.replace(" ", "")
    wide = jnp.reshape(
        array.astype(jnp.float32),
        shape,
        out_sharding=weight_spec(f"{letters[:at]}{letters[at]}.{letters[at + 1 :]}"),
    )
    largest = jnp.abs(wide).max(axis=axis, keepdims=True)
    scales = largest / 127 if kind == "int8" else largest
    scaled = wide / jnp.where(scales > 0, scales, 1.0)
    if kind == "int8":
        return Quantized(jnp.clip(jnp.round(scaled), -127, 127).astype(jnp.int8), scales, axis)
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += (scaled > (low + high) / 2).astype(jnp.uint8)
    first, second = jnp.split(codes, 2, axis=axis)
    return Quantized(first | (second << 4), scales, axis)


def dequantize(weight: Quantized, dtype: Any) -> Array:
    """The weight that codes and scales stand for, divided like them; rounded once, to `dtype`."""
    codes, at = weight.codes, weight.codes.ndim + weight.axis
    if codes.dtype == jnp.uint8:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=at)
        values = _nf4_values(codes)
    else:
        values = codes.astype(jnp.float32)
    wide = values * weight.scales
    shape = (*wide.shape[: at - 1], wide.shape[at - 1] * wide.shape[at], *wide.shape[at + 1 :])
    divided = None
    if spec("") is not None:
        over = jax.typeof(wide).sharding.spec
        divided = jax.P(*over[:at], *over[at + 1 :])
    return jnp.reshape(wide.astype(dtype), shape, out_sharding=divided)


def _nf4_values(codes: Array) -> Array:
    """The values of codes 0 to 15: chosen bit by bit, since accelerators look tables up slowly."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def frozen_linear(equation: str, x: Array, weight: Quantized) -> Array:
    """`linear(equation, x, WEIGHT)` of a quantized weight, which has no gradient.

    Codes travel between devices, not what is made of them.
    """
    return cast(Array, _frozen_linear(equation, x, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_linear(equation: str, x: Array, weight: Quantized) -> Array:
    return linear(equation, x, _whole(equation, weight, x.dtype))


def _frozen_linear_forward(equation: str, x: Array, weight: Quantized):
    return _frozen_linear(equation, x, weight), weight


def _frozen_linear_backward(equation: str, weight: Quantized, grad: Array):
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    whole = _whole(equation, weight, grad.dtype)
    return linear(f"{out},{w_axes}->{x_axes}", grad, whole), None


_frozen_linear.defvjp(_frozen_linear_forward, _frozen_linear_backward)


def _whole(equation: str, weight: Quantized, dtype: Any) -> Array:
    """The weight gathered but for the axes that activations have divided too."""
    letters = equation.split("->")[0].split(",")[1]
    at = len(letters) + weight.axis
    partition = spec(f"{letters[: at + 1]}.{letters[at + 1 :]}")
    if partition is not None:
        weight = jax.tree.map(lambda x: jax.reshard(x, partition), weight)
    return dequantize(weight, dtype)


def freeze(params: Params, kind: str, dtype: str) -> Params:
    """Parameters that are only read: projections quantized, all else in the computation's dtype.

    `params` is emptied on the way, so that no more than one parameter is there twice.

    Args:
        params: all of a model.
        kind: "int8", "nf4", or "full" for nothing quantized.
        dtype: of the computation, in which parameters are used anyway.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    params.clear()
    for path in list(flat):
        leaf = flat.pop(path)
        if kind != "full" and path.count("/") == 2:
            flat[path] = _quantize(leaf, PARAM_AXES[path], kind)
        else:
            flat[path] = leaf.astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


_quantize = jax.jit(quantize, static_argnums=(1, 2))
