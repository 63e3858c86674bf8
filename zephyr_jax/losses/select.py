"""The loss that a configuration names, checked against the rest of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zephyr_jax.config.run import RunConfig
from zephyr_jax.losses.pairs import Loss, PairLogps
from zephyr_jax.losses.preference import ACROSS_BATCH, combined
from zephyr_jax.losses.reference_free import REFERENCE_FREE


def loss_of(config: RunConfig) -> Loss:
    """The loss of the run's preference stage.

    Raises:
        ValueError: if a name is unknown, or an option or another part of the configuration does
            not go with the loss.
    """
    dpo = config.dpo
    assert dpo is not None
    names = dpo.loss_weights
    loss = combined(names)
    needing = [name for name in names if name not in REFERENCE_FREE]
    if dpo.reference == "none" and needing:
        raise ValueError(
            f"dpo.loss={dpo.loss} compares with a reference, and dpo.reference is none; take "
            f"precomputed, or a loss without: {', '.join(REFERENCE_FREE)}"
        )
    ranked = [name for name in names if name in ACROSS_BATCH]
    if ranked and config.train.micro_batches > 1:
        raise ValueError(
            f"dpo.loss={ranked[0]} ranks the pairs of a whole batch, and train.micro_batches="
            f"{config.train.micro_batches} would show it portions; use 1"
        )
    if ranked and dpo.wpo:
        raise ValueError(f"dpo.wpo weights pairs, and dpo.loss={ranked[0]} is of ranks; drop one")
    if dpo.bco_decay is not None and "bco_pair" not in names:
        raise ValueError(
            f"dpo.bco_decay={dpo.bco_decay} is for bco_pair, and dpo.loss is {dpo.loss}; use None"
        )
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    # What the losses themselves refuse is refused now.
    jax.eval_shape(lambda x: loss(PairLogps(*[x] * 6), dpo, x), one)
    return loss
