"""Log-probabilities and losses of arrays, float32: sums and weights, which are divided once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zephyr_jax.config.preference import LossOptions
from zephyr_jax.losses.pairs import PairLogps, rewards
from zephyr_jax.losses.preference import sigmoid
from zephyr_jax.types import AnyArray


def token_logps(
    logits: Float[AnyArray, "B T V"], tokens: Int[AnyArray, "B T"], loss_mask: Bool[AnyArray, "B T"]
) -> Float[Array, "B T"]:
    """Entry t is log p(token t | the tokens before it in the row), float32; 0 where masked.

    The predictor of token t is logits[t-1], so entry 0 is always 0. The target is picked by
    comparison, never by a gather, so the vocabulary may be sharded over devices.
    """
    logits, tokens = jnp.asarray(logits, jnp.float32), jnp.asarray(tokens)
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # target of each predictor
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[:, :, None]
    picked = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    logps = picked - jax.nn.logsumexp(logits, axis=-1)
    shifted = jnp.concatenate([jnp.zeros_like(logps[:, :1]), logps[:, :-1]], axis=1)
    first = jnp.arange(logps.shape[1])[None] == 0
    return jnp.where(jnp.asarray(loss_mask, bool) & ~first, shifted, 0.0)


def pair_logps(
    logps: Float[AnyArray, "B T"],
    segments: Int[AnyArray, "B T"],
    branches: Int[AnyArray, "B T"],
    n_pairs: int,
) -> Float[Array, "B K 2"]:
    """The summed log-probs of every document's chosen (0) and rejected (1) answer, in nats.

    Document k of a row is segment k+1; documents a row does not have sum to 0.
    """
    logps, segments, branches = map(jnp.asarray, (logps, segments, branches))
    document = segments[:, :, None, None] == jnp.arange(1, n_pairs + 1)[None, None, :, None]
    branch = branches[:, :, None, None] == jnp.arange(1, 3)[None, None, None, :]
    return jnp.where(document & branch, logps[:, :, None, None], 0.0).sum(axis=1)


class LossInfo(NamedTuple):
    """The sum and weight of a mean loss; of `dpo_loss` also each pair's values, no gradients."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    losses: Any = None  # *N, as the others
    chosen_rewards: Any = None
    rejected_rewards: Any = None


def sft_loss(
    logps: Float[AnyArray, "B T"], loss_mask: Bool[AnyArray, "B T"]
) -> tuple[Float[Array, ""], LossInfo]:
    """Mean negative log-likelihood of the targets, nats per token; a row's first is none."""
    weight = jnp.asarray(loss_mask)[:, 1:].sum(dtype=jnp.float32)
    total = -jnp.asarray(logps, jnp.float32).sum()
    return total / jnp.maximum(weight, 1.0), LossInfo(total, weight)


def dpo_loss(
    chosen: Float[AnyArray, "*N"],
    rejected: Float[AnyArray, "*N"],
    ref_chosen: Float[AnyArray, "*N"],
    ref_rejected: Float[AnyArray, "*N"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    weights: Float[AnyArray, "*N"] | Bool[AnyArray, "*N"] | None = None,
) -> tuple[Float[Array, ""], LossInfo]:
    """Mean DPO loss over the pairs, and its parts, from summed log-probs in nats; all float32.

    -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), `sigmoid` in
    `zephyr_jax.losses.preference`. `weights` are those of pairs in the mean; None: all 1.
    """
    weights = jnp.ones_like(chosen, jnp.float32) if weights is None else weights
    weights = jnp.asarray(weights, jnp.float32)
    options = LossOptions(beta=beta, label_smoothing=label_smoothing)
    none = jnp.zeros(jnp.shape(chosen))  # how many tokens were summed does not matter
    pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, none, none)
    losses = sigmoid(pairs, options, weights)
    total, weight = (weights * losses).sum(), weights.sum()
    values = jax.lax.stop_gradient((losses, *rewards(pairs, options)))
    return total / jnp.where(weight > 0, weight, 1.0), LossInfo(total, weight, *values)
