"""Frozen projections in 4 or 8 bits, for training adapters (QLoRA; arXiv:2305.14314).

A weight is cut into blocks of up to 64 values. A block has one float32 scale, and each value a
small code: the nearest of 16 quantiles of a normal distribution (nf4, two codes in a byte), or of
255 even steps (int8). A layer dequantizes a weight where it uses it, and again in the backward
pass, so that never more than one exists in full.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
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
# Quantiles of a normal distribution within [-1, 1], appendix E of the paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as codes and scales; axis `axis` of both counts the values of a block.

    An axis of D values becomes two, `D/64 64` (nf4: 32 bytes, whose low halves are the first 32).
    """

    codes: Array  # int8; nf4: uint8
    scales: Array  # float32
    axis: int = dataclasses.field(metadata={"static": True})  # from the end, so also of one layer

    def __getitem__(self, index: Any) -> Quantized:
        """What `index` selects of the leading axes."""
        return cast(Quantized, jax.tree.map(lambda x: x[index], self))


def _blocked(axes: str, sizes: tuple[int, ...], name: str = "a weight") -> tuple[int, int]:
    """The axis of the blocks (D, or the one before a last D) from the end, and a block's values."""
    names = axes.split()
    axis = -2 if names[-1] == "D" else names.index("D") - len(names)
    size, block = sizes[axis], math.gcd(BLOCK, sizes[axis])
    over = axes_of(names[axis], WEIGHT_RULES)
    if block < _SMALLEST or (size // block) % axis_size(*over):
        mesh_axes = " x ".join(over)
        raise ValueError(
            f"axis {names[axis]}={size} of {name} has {size // block} blocks of {block} for "
            f"quantizing; they must have {_SMALLEST} values or more, and be divisible by the mesh "
            f"({mesh_axes or 'not sharded'}={axis_size(*over)}); use another mesh or lora.base=full"
        )
    return axis, block


def check_blocks(cfg: MistralConfig) -> None:
    """Raises a ValueError if a projection cannot be cut into blocks on the ambient mesh."""
    for path, shape in param_shapes(cfg).items():
        if path.count("/") == 2:
            _blocked(PARAM_AXES[path], shape, path)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(array: Float[Array, ...], axes: str, kind: str) -> Quantized:
    """Codes and scales ("int8" or "nf4") of a weight with these logical axes, sharded like it."""
    axis, block = _blocked(axes, array.shape)
    at = array.ndim + axis
    shape = (*array.shape[:at], array.shape[at] // block, block, *array.shape[at + 1 :])
    names = axes.replace(" ", "")
    partition = weight_spec(f"{names[: at + 1]}.{names[at + 1 :]}")
    wide = jnp.reshape(array.astype(jnp.float32), shape, out_sharding=partition)
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
    """The weight that codes and scales stand for, sharded like them; rounded once, to `dtype`."""
    codes, at = weight.codes, weight.codes.ndim + weight.axis
    if codes.dtype == jnp.uint8:
        values = _nf4_values(jnp.concatenate([codes & 15, codes >> 4], axis=at))
    else:
        values = codes.astype(jnp.float32)
    wide = values * weight.scales
    shape = (*wide.shape[: at - 1], wide.shape[at - 1] * wide.shape[at], *wide.shape[at + 1 :])
    partition = None
    if spec("") is not None:
        over = jax.typeof(wide).sharding.spec
        partition = jax.P(*over[:at], *over[at + 1 :])
    return jnp.reshape(wide.astype(dtype), shape, out_sharding=partition)


def _nf4_values(codes: Array) -> Array:
    """The values of codes 0 to 15, bit by bit, since table lookups are slow on accelerators."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_linear(equation: str, x: Array, weight: Quantized) -> Array:
    """`linear` of a quantized weight, which has no gradient; only codes travel between devices."""
    return linear(equation, x, _gathered(equation, weight, x.dtype))


def _frozen_linear_forward(equation: str, x: Array, weight: Quantized):
    return frozen_linear(equation, x, weight), weight


def _frozen_linear_backward(equation: str, weight: Quantized, grad: Array):
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    dequantized = _gathered(equation, weight, grad.dtype)
    return linear(f"{out},{w_axes}->{x_axes}", grad, dequantized), None


frozen_linear.defvjp(_frozen_linear_forward, _frozen_linear_backward)


def _gathered(equation: str, weight: Quantized, dtype: Any) -> Array:
    """The dequantized weight, gathered but for the axes that activations are sharded over too."""
    names = equation.split("->")[0].split(",")[1]
    at = len(names) + weight.axis
    partition = spec(f"{names[: at + 1]}.{names[at + 1 :]}")
    if partition is not None:
        weight = jax.tree.map(lambda x: jax.reshard(x, partition), weight)
    return dequantize(weight, dtype)


def freeze(params: Params, kind: str, dtype: str) -> Params:
    """Frozen parameters: projections quantized (but for "full"), all else in `dtype`.

    `params` is emptied on the way, so that no more than one parameter exists twice.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    params.clear()
    for path in list(flat):
        leaf = flat.pop(path)
        if kind != "full" and path.count("/") == 2:
            flat[path] = quantize(leaf, PARAM_AXES[path], kind)
        else:
            flat[path] = leaf.astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
