"""What a layer's backward pass finds saved, and what it computes anew."""

from __future__ import annotations

from typing import Any

import jax

from zephyr_jax.config.checks import choose, names_in
from zephyr_jax.config.run import REMATS, SAVED

LAYER_INPUT = "layer"  # the residual stream before a layer


def remat_policy(remat: str) -> Any:
    """The policy for `jax.checkpoint` that `config.train.remat` names; not for "none".

    Raises:
        ValueError: if a name is not known.
    """
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
    names = names_in(remat)
    for name in names:
        choose("remat", name, (*REMATS, *SAVED))
    return policies.save_only_these_names(*names)
