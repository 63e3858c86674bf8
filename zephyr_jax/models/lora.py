"""Low-rank adapters of frozen projections (Hu et al. 2021, arXiv:2106.09685).

An adapter is a pair of matrices a and b with a small axis R between them; a projection x W becomes
x W + alpha / rank (x a) b. Adapters are a tree of their own, at the paths of the parameters that
they adapt, stacked over layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.layers import linear
from zephyr_jax.models.parameters import abstract_tree, axis_sizes, shapes_of
from zephyr_jax.models.quantized import Quantized, frozen_linear
from zephyr_jax.sharding import spec, weight_spec
from zephyr_jax.types import Params

# Each projection's parameter, and its axes: those that are contracted with what the projection
# reads, and those of what it writes.
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
        out[f"{path}/a"] = f"L {read} R"
        out[f"{path}/b"] = f"L R {written}"
    return out


def adapter_shapes(cfg: MistralConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix, by path."""
    return shapes_of(adapter_axes(lora), axis_sizes(cfg) | {"R": lora.rank})


def abstract_adapters(cfg: MistralConfig, lora: LoraConfig) -> Params:
    """Shape, float32 and sharding of every matrix on the ambient mesh; nothing is allocated."""
    return abstract_tree(adapter_axes(lora), adapter_shapes(cfg, lora))


def init_adapters(cfg: MistralConfig, lora: LoraConfig, key: PRNGKeyArray) -> Params:
    """Adapters that change nothing yet, as in PEFT: a uniform within 1 / sqrt(inputs), b zero.

    Float32, created with their sharding on the ambient mesh; values depend on the key alone.
    """

    def init(key):
        out = {}
        for number, (path, shape) in enumerate(adapter_shapes(cfg, lora).items()):
            if path.endswith("/b"):
                out[path] = jnp.zeros(shape, jnp.float32)
                continue
            bound = 1 / math.sqrt(math.prod(shape[1:-1]))
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraContext:
    """Adapters and the keys of their dropout: of all layers, stacked, or of one."""

    adapters: Params
    keys: PRNGKeyArray | None
    config: LoraConfig = dataclasses.field(metadata={"static": True})


def project(
    name: str,
    equation: str,
    x: Array,
    weight: Array | Quantized,
    reduce_dtype: str,
    lora: LoraContext | None,
) -> Array:
    """`linear(equation, x, weight)`, or that of a quantized weight, plus the adapter's products.

    All are in the dtype of `x`. Dropout zeroes entries of what the adapter of projection `name`
    reads and scales the others up; each projection draws its own from the layer's key.
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
        kept = jax.random.bernoulli(key, keep, x.shape, out_sharding=spec(x_axes))
        x = jnp.where(kept, x / keep, jnp.zeros_like(x))
    tokens = "Z" if "Z" in x_axes + out_axes else out_axes[1]  # what travels is as narrow as R
    narrow, widen = f"{x_axes},{read}R->B{tokens}R", f"B{tokens}R,R{written}->{out_axes}"
    inner: Any = linear(narrow.replace(" ", ""), x, adapter["a"], reduce_dtype)
    added: Any = linear(widen.replace(" ", ""), inner, adapter["b"], reduce_dtype)
    return out + lora.config.alpha / lora.config.rank * added
