"""Low-rank adapters of frozen projections, which may be quantized.

LoRA, Hu et al. 2021, arXiv:2106.09685: x W becomes x W + alpha / rank (x a) b, with a small axis R
between a and b. Adapters are a tree of their own, at the paths of the parameters that they adapt.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314: a block of up to 64 values of W has one float32
scale, and each value a code: the nearest of 16 quantiles of a normal distribution (nf4, two in a
byte), or of 255 even steps (int8). A layer dequantizes a weight when it uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models import parameters
from zephyr_jax.models.layers import linear, token_axis
from zephyr_jax.models.parameters import PARAM_AXES
from zephyr_jax.sharding import WEIGHT_RULES, axes_of, axis_size, reshard, spec, weight_spec
from zephyr_jax.types import Params

# Each projection's parameter, the axes that it contracts with its input, and those of its output.
_PATHS = {
    "q": ("layers/attention/q", "D", "K G H"),
    "k": ("layers/attention/k", "D", "K H"),
    "v": ("layers/attention/v", "D", "K H"),
    "o": ("layers/attention/o", "K G H", "D"),
    "gate": ("layers/mlp/gate", "D", "F"),
    "up": ("layers/mlp/up", "D", "F"),
    "down": ("layers/mlp/down", "F", "D"),
}


def adapter_axes(lora: LoraConfig) -> dict[str, str]:
    """The logical axes of every matrix, by path: `layers/attention/q/a` is "L D R"."""
    out = {}
    for name in lora.targets:
        path, read, written = _PATHS[name]
        out |= {f"{path}/a": f"L {read} R", f"{path}/b": f"L R {written}"}
    return out


def adapter_shapes(cfg: MistralConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix, by path."""
    return parameters.shapes_of(adapter_axes(lora), parameters.axis_sizes(cfg) | {"R": lora.rank})


def abstract_adapters(cfg: MistralConfig, lora: LoraConfig) -> Params:
    """Shape, float32 and sharding of every matrix on the ambient mesh; nothing is allocated."""
    return parameters.abstract_tree(adapter_axes(lora), adapter_shapes(cfg, lora))


def init_adapters(cfg: MistralConfig, lora: LoraConfig, key: PRNGKeyArray) -> Params:
    """Adapters that change nothing yet, as in PEFT: a uniform within 1 / sqrt(inputs), b zero."""

    def init(key):
        out = {}
        for number, (path, shape) in enumerate(adapter_shapes(cfg, lora).items()):
            bound = 0 if path.endswith("/b") else 1 / math.sqrt(math.prod(shape[1:-1]))
            own = jax.random.fold_in(key, number)
            out[path] = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        return traverse_util.unflatten_dict(out, sep="/")

    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(cfg, lora))
    return jax.jit(init, out_shardings=shardings)(key)


def merge(params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters W + alpha / rank a b, summed in float32 and returned in W's dtype."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    matrices = traverse_util.flatten_dict(adapters, sep="/")
    for name in lora.targets:
        path, read, written = _PATHS[name]
        a, b, weight = matrices[f"{path}/a"], matrices[f"{path}/b"], flat[path]
        equation = f"L{read}R,LR{written}->L{read}{written}".replace(" ", "")
        over = weight_spec(equation.split("->")[1])
        product = jnp.einsum(equation, a, b, precision="highest", out_sharding=over)
        wide = weight.astype(jnp.float32) + lora.alpha / lora.rank * product
        flat[path] = wide.astype(weight.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


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
    for path, shape in parameters.param_shapes(cfg).items():
        if path.count("/") == 2:
            _blocked(PARAM_AXES[path], shape, path)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(array: Float[Array, ...], axes: str, kind: str) -> Quantized:
    """Codes and scales ("int8" or "nf4") of a weight with these logical axes, sharded like it."""
    axis, block = _blocked(axes, array.shape)
    at = array.ndim + axis
    shape = (*array.shape[:at], array.shape[at] // block, block, *array.shape[at + 1 :])
    wide = array.astype(jnp.float32).reshape(shape)
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
    wide = (values * weight.scales).astype(dtype)
    return jax.lax.collapse(wide, at - 1, at + 1)


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


def _frozen_linear_backward(equation: str, weight: Quantized, grad: Array):
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    dequantized = _gathered(equation, weight, grad.dtype)
    return linear(f"{out},{w_axes}->{x_axes}", grad, dequantized), None


frozen_linear.defvjp(lambda *args: (frozen_linear(*args), args[2]), _frozen_linear_backward)


def _gathered(equation: str, weight: Quantized, dtype: Any) -> Array:
    """The dequantized weight, gathered but for the axes that activations are sharded over too."""
    names = equation.split("->")[0].split(",")[1]
    at = len(names) + weight.axis
    axes = f"{names[: at + 1]}.{names[at + 1 :]}"
    return dequantize(jax.tree.map(lambda x: reshard(x, axes), weight), dtype)


def freeze(params: Params, kind: str, dtype: str) -> Params:
    """Projections quantized (but for "full"), all else in `dtype`; empties `params` on the way."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    params.clear()
    for path in list(flat):
        leaf = flat.pop(path)
        quantized = kind != "full" and path.count("/") == 2
        flat[path] = quantize(leaf, PARAM_AXES[path], kind) if quantized else leaf.astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraContext:
    """Adapters and the keys of their dropout: of all layers, stacked, or of one."""

    adapters: Params
    keys: PRNGKeyArray | None
    config: LoraConfig = dataclasses.field(metadata={"static": True})


def dropout_mask(key: PRNGKeyArray, keep: float, shape: tuple[int, ...], axes: str) -> Array:
    """Which entries of an array with these logical axes stay, each with probability `keep`.

    A hash of an entry's place and of the key, the same on every mesh as `jax.random.bernoulli` is,
    whose 120 operations an entry were a third of a step on TPU (docs/speed.md); these are 15.
    """
    x, words = jnp.uint32(0), jax.random.bits(key, (3,), jnp.uint32)
    for axis, size in enumerate(shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=spec(axes))
        x = x * np.uint32(size) + at
    for word, factor in zip(words, (0x9E3779B1, 0x7FEB352D, 0x846CA68B), strict=True):
        x = (x ^ (x >> 16) ^ word) * np.uint32(factor)
    return x < np.uint32(keep * 2**32)


def project(
    name: str,
    equation: str,
    x: Array,
    weight: Array | Quantized,
    reduce_dtype: str,
    lora: LoraContext | None,
) -> Array:
    """`linear(equation, x, weight)`, or that of a quantized weight, plus the adapter's products.

    All are in the dtype of `x`. Each projection draws its dropout from the layer's key.
    """
    out: Any
    if isinstance(weight, Quantized):
        out = frozen_linear(equation, x, weight)
    else:
        out = linear(equation, x, weight, reduce_dtype)
    if lora is None or name not in lora.config.targets:
        return out
    path, read, written = _PATHS[name]
    adapter = lora.adapters[path.split("/")[1]][name]
    inputs, out_axes = equation.split("->")
    x_axes, keep = inputs.split(",")[0], 1 - lora.config.dropout
    if lora.keys is not None and lora.config.dropout:
        key = jax.random.fold_in(lora.keys, list(_PATHS).index(name))
        kept = dropout_mask(key, keep, x.shape, x_axes)
        x = jnp.where(kept, x / keep, jnp.zeros_like(x))
    tokens = "Z" if "Z" in x_axes else token_axis(out_axes)  # what travels is as narrow as R
    narrow, widen = f"{x_axes},{read}R->B{tokens}R", f"B{tokens}R,R{written}->{out_axes}"
    inner: Any = linear(narrow.replace(" ", ""), x, adapter["a"], reduce_dtype)
    added: Any = linear(widen.replace(" ", ""), inner, adapter["b"], reduce_dtype)
    return out + lora.config.alpha / lora.config.rank * added
