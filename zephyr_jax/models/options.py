"""How a forward pass is computed, as one value that every layer of the code hands on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from zephyr_jax.config.checks import choose
from zephyr_jax.config.run import REMATS, SAVED, LoraConfig
from zephyr_jax.types import Params

LAYER_INPUT = "layer"  # the residual stream before a layer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "dropout_key"],
    meta_fields=["remat", "reduce_dtype", "attention", "lora"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """Options of a forward pass; the defaults are those of inference."""

    remat: str | tuple[str, ...] = "none"  # or "dots", "full", "offload", or the outputs to save
    reduce_dtype: str = "float32"  # of sums of weight gradients, also across devices
    attention: str = "auto"  # or "einsum", "tiled", "splash", "cudnn"
    adapters: Params | None = None  # as from `lora.init_adapters`
    lora: LoraConfig | None = None  # the adapters' rank, scale and dropout rate
    dropout_key: PRNGKeyArray | None = None  # of the adapters' dropout; None: no dropout


INFERENCE = ForwardOptions()


def remat_policy(remat: str | tuple[str, ...]) -> Any:
    """The policy for `jax.checkpoint` that `config.train.remat` names; not for "none"."""
    policies = jax.checkpoint_policies
    match remat:
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "full":
            return policies.nothing_saveable
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
    names = (remat,) if isinstance(remat, str) else remat
    choose("remat", names, (*REMATS, *SAVED))
    return policies.save_only_these_names(*names)
