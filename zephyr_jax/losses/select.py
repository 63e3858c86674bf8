"""The loss that a configuration names, checked against the rest of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.losses.pairs import Loss, PairLogps
from zephyr_jax.losses.preference import ACROSS_BATCH, combined
from zephyr_jax.losses.reference_free import REFERENCE_FREE


def loss_of(dpo: DpoConfig, n_micro: int) -> Loss:
    """The loss of a preference stage whose steps have `n_micro` micro-batches.

    Raises:
        ValueError: if a name is unknown, or an option does not go with the loss.
    """
    names = dpo.loss_weights
    loss = combined(names)
    if dpo.reference == "none" and not names.keys() <= REFERENCE_FREE.keys():
        raise ValueError(
            f"dpo.loss={dpo.loss} compares with a reference, and dpo.reference is none; take "
            f"precomputed, or a loss without: {', '.join(REFERENCE_FREE)}"
        )
    ranked = [name for name in names if name in ACROSS_BATCH]
    if ranked and n_micro > 1:
        raise ValueError(
            f"dpo.loss={ranked[0]} ranks the pairs of a whole batch, and train.micro_batches="
            f"{n_micro} would show it parts; use 1"
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
