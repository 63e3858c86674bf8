"""Every parameter's path, axes and sharding: the table that all others follow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.sharding import named_sharding, param_specs
from zephyr_jax.types import Params

# Every parameter's axes (letters of zephyr_jax.types); sharding and weight tables follow from it.
PARAM_AXES = {
    "embed": "V D",
    "layers/attention_norm": "L D",
    "layers/attention/q": "L D K G H",
    "layers/attention/k": "L D K H",
    "layers/attention/v": "L D K H",
    "layers/attention/o": "L K G H D",
    "layers/mlp_norm": "L D",
    "layers/mlp/gate": "L D F",
    "layers/mlp/up": "L D F",
    "layers/mlp/down": "L F D",
    "final_norm": "D",
    "head": "D V",
}


def _axis_sizes(cfg: MistralConfig) -> dict[str, int]:
    return {
        "V": cfg.vocab_size,
        "D": cfg.hidden_size,
        "F": cfg.intermediate_size,
        "L": cfg.num_hidden_layers,
        "K": cfg.num_key_value_heads,
        "G": cfg.num_attention_heads // cfg.num_key_value_heads,
        "H": cfg.head_dim,
    }


def param_axes(cfg: MistralConfig) -> dict[str, str]:
    """PARAM_AXES of this configuration: tied embeddings have no head."""
    return {k: v for k, v in PARAM_AXES.items() if k != "head" or not cfg.tie_word_embeddings}


def param_shapes(cfg: MistralConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    sizes = _axis_sizes(cfg)
    return {k: tuple(sizes[a] for a in v.split()) for k, v in param_axes(cfg).items()}


def param_shardings(cfg: MistralConfig) -> Params:
    """The sharding of every parameter on the ambient mesh, as the tree of the parameters."""
    specs = param_specs(param_axes(cfg), param_shapes(cfg))
    return traverse_util.unflatten_dict({k: named_sharding(v) for k, v in specs.items()}, sep="/")


def abstract_params(cfg: MistralConfig) -> Params:
    """Shape, float32 and sharding of every parameter on the ambient mesh; nothing is allocated."""
    shapes = traverse_util.unflatten_dict(param_shapes(cfg), sep="/")
    return jax.tree.map(
        lambda sharding, shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        param_shardings(cfg),
        shapes,
    )


def count_params(cfg: MistralConfig) -> int:
    """The number of parameters."""
    sizes = _axis_sizes(cfg)
    axes = (letters.split() for letters in param_axes(cfg).values())
    return sum(functools.reduce(lambda n, a: n * sizes[a], names, 1) for names in axes)
