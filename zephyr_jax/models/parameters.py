"""Every parameter's path, axes and sharding, the table that all others follow; and FLOPs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.sharding import WEIGHT_RULES, axes_of, axis_size, named_sharding, weight_spec
from zephyr_jax.types import Params

# Logical axes of every parameter (zephyr_jax.types); sharding and weight tables follow from them.
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


def axis_sizes(cfg: MistralConfig) -> dict[str, int]:
    """The size of every logical axis of the parameters."""
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
    return shapes_of(param_axes(cfg), axis_sizes(cfg))


def shapes_of(table: dict[str, str], sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays from their logical axes, by path."""
    return {path: tuple(sizes[axis] for axis in axes.split()) for path, axes in table.items()}


def param_shardings(cfg: MistralConfig) -> Params:
    """The sharding of every parameter on the ambient mesh, as the tree of the parameters."""
    return jax.tree.map(lambda x: x.sharding, abstract_params(cfg))


def abstract_params(cfg: MistralConfig) -> Params:
    """Shape, float32 and sharding of every parameter on the ambient mesh; nothing is allocated."""
    return abstract_tree(param_axes(cfg), param_shapes(cfg))


def abstract_tree(table: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Params:
    """Shape, float32 and sharding of arrays from their logical axes, as a tree.

    A ValueError if the mesh does not divide a size.
    """
    flat = {}
    for path, axes in table.items():
        for size, axis in zip(shapes[path], axes.split(), strict=True):
            names = axes_of(axis, WEIGHT_RULES)
            if size % axis_size(*names):
                raise ValueError(
                    f"axis {axis}={size} of parameter {path} is not divisible by the mesh axis "
                    f"{' x '.join(names)}={axis_size(*names)}; choose one that divides {size}"
                )
        sharding = named_sharding(weight_spec(axes.replace(" ", "")))
        flat[path] = jax.ShapeDtypeStruct(shapes[path], jnp.float32, sharding=sharding)
    return traverse_util.unflatten_dict(flat, sep="/")


def count_params(cfg: MistralConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(shape) for shape in param_shapes(cfg).values())


def model_flops_per_token(cfg: MistralConfig, seq_len: int) -> float:
    """FLOPs of training on one token of a row of `seq_len`, by the convention of MFU figures.

    Three times the forward pass's matrix products, without recomputation. The row counts as one
    document, and causal attention W T - W^2 / 2 pairs of it, W being T or the shorter window.
    """
    layers = {k: v for k, v in param_shapes(cfg).items() if k.count("/") == 2}
    weights = sum(map(math.prod, layers.values()))
    weights += cfg.hidden_size * cfg.vocab_size  # the head, tied or not
    window = seq_len if cfg.sliding_window is None else min(cfg.sliding_window, seq_len)
    pairs = window - window**2 / (2 * seq_len)  # keys that a query sees, on average
    scores_and_values = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
    return 3 * 2 * (weights + scores_and_values * pairs)
