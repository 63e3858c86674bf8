"""Low-rank adapters of frozen projections (Hu et al. 2021, arXiv:2106.09685).

An adapter is a pair of matrices a and b with a small axis R between them; a projection x W becomes
x W + alpha / rank (x a) b. Adapters are a tree of their own, at the paths of the parameters that
they adapt, stacked over layers like these.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.layers import linear
from zephyr_jax.models.options import ForwardOptions
from zephyr_jax.models.parameters import PARAM_AXES, abstract_tree, axis_sizes, shapes_of
from zephyr_jax.models.quantized import Quantized, frozen_linear
from zephyr_jax.sharding import spec, weight_spec
from zephyr_jax.types import Params

# Where each projection's parameter is, and which of its axes are contracted with what it reads.
_PATHS = {
    "q": ("layers/attention/q", "D"),
    "k": ("layers/attention/k", "D"),
    "v": ("layers/attention/v", "D"),
    "o": ("layers/attention/o", "K G H"),
    "gate": ("layers/mlp/gate", "D"),
    "up": ("layers/mlp/up", "D"),
    "down": ("layers/mlp/down", "F"),
}


class Adapter(NamedTuple):
    """One layer's adapter of one projection, and how it is applied."""

    a: Array
    b: Array
    scale: float
    dropout: float
    key: PRNGKeyArray | None  # of the dropout; None: there is none


def adapter_axes(lora: LoraConfig) -> dict[str, str]:
    """The logical axes of every matrix, by path: `layers/attention/q/a` is "L D R"."""
    out = {}
    for name in lora.targets:
        path, read = _PATHS[name]
        out[f"{path}/a"] = f"L {read} R"
        out[f"{path}/b"] = f"L R {_written(path, read)}"
    return out


def _written(path: str, read: str) -> str:
    """The axes of what a projection writes: those of its parameter that it does not contract."""
    return " ".join(x for x in PARAM_AXES[path].split() if x not in ("L", *read.split()))


def adapter_shapes(cfg: MistralConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix, by path."""
    return shapes_of(adapter_axes(lora), axis_sizes(cfg) | {"R": lora.rank})


def abstract_adapters(cfg: MistralConfig, lora: LoraConfig) -> Params:
    """Shape, float32 and sharding of every matrix on the ambient mesh; nothing is allocated."""
    return abstract_tree(adapter_axes(lora), adapter_shapes(cfg, lora))


def init_adapters(cfg: MistralConfig, lora: LoraConfig, key: PRNGKeyArray) -> Params:
    """Adapters that change nothing yet: a uniform within 1 / sqrt(its inputs), b zero; float32.

    As in PEFT. Created with their sharding on the ambient mesh; values depend on the key alone.
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
    """Parameters that compute alone what they compute with the adapters: W + alpha / rank a b.

    The sum is taken in float32 and returned in the dtype of the parameter.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    matrices = traverse_util.flatten_dict(adapters, sep="/")
    for name in lora.targets:
        path, read = _PATHS[name]
        a, b = matrices[f"{path}/a"], matrices[f"{path}/b"]
        read, written = (x.replace(" ", "") for x in (read, _written(path, read)))
        weight, axes = flat[path], PARAM_AXES[path].replace(" ", "")
        product = jnp.einsum(
            f"L{read}R,LR{written}->{axes}",
            a,
            b,
            precision="highest",
            out_sharding=weight_spec(axes),
        )
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


def lora_context(options: ForwardOptions) -> LoraContext | None:
    """The adapters of all layers that a forward pass applies; None if there are none."""
    if options.adapters is None or options.lora is None:
        return None
    layers, keys = options.adapters["layers"], options.dropout_key
    if keys is not None:
        keys = jax.random.split(keys, len(jax.tree.leaves(layers)[0]))
    return LoraContext(layers, keys, options.lora)


def adapter_of(lora: LoraContext | None, name: str) -> Adapter | None:
    """One layer's adapter of projection `name`; None if there is none.

    Each projection draws dropout of its own from the layer's key.
    """
    if lora is None or name not in lora.config.targets:
        return None
    group, key = lora.adapters[_PATHS[name][0].split("/")[1]][name], lora.keys
    if key is not None:
        key = jax.random.fold_in(key, list(_PATHS).index(name))
    scale = lora.config.alpha / lora.config.rank
    return Adapter(group["a"], group["b"], scale, lora.config.dropout, key)


def project(
    equation: str, x: Array, weight: Array | Quantized, reduce_dtype: str, adapter: Adapter | None
) -> Array:
    """`linear(equation, x, weight)`, or that of a quantized weight, with what the adapter adds.

    The adapter's products are in the dtype of `x`, like the projection's. Dropout zeroes entries
    of what the adapter reads and scales the others up.
    """
    if isinstance(weight, Quantized):
        out = frozen_linear(equation, x, weight)
    else:
        out = linear(equation, x, weight, reduce_dtype)
    if adapter is None:
        return out
    inputs, out_axes = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    read = "".join(c for c in w_axes if c in x_axes)
    written = "".join(c for c in w_axes if c not in x_axes)
    if adapter.key is not None and adapter.dropout:
        kept = jax.random.bernoulli(
            adapter.key, 1 - adapter.dropout, x.shape, out_sharding=spec(x_axes)
        )
        x = jnp.where(kept, x / (1 - adapter.dropout), jnp.zeros_like(x))
    tokens = "Z" if "Z" in x_axes + out_axes else out_axes[1]  # what travels is as narrow as R
    inner = linear(f"{x_axes},{read}R->B{tokens}R", x, adapter.a, reduce_dtype)
    added = linear(f"B{tokens}R,R{written}->{out_axes}", inner, adapter.b, reduce_dtype)
    return out + adapter.scale * added
