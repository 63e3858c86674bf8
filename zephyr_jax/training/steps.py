"""One training step, one evaluation step: pure functions that `jax.jit` compiles.

SFT and the preference losses differ in one function, from parameters and a batch to sums.
Gradients of sums are added over micro-batches in float32 and divided once by the whole weight, so
how a batch is cut changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from zephyr_jax.config.run import RunConfig
from zephyr_jax.losses.pairs import RewardShift, update_shift
from zephyr_jax.losses.select import loss_of
from zephyr_jax.losses.tokens import sft_loss
from zephyr_jax.training.scores import (
    PairScores,
    StepInputs,
    in_order,
    micro_batches,
    pair_scores,
    policy_scores,
)
from zephyr_jax.types import Params, PreferenceBatch, Rows, TrainState

Sums = dict[str, Array]  # name -> float32 sum; "weight" is what the loss is divided by


class BatchSums(NamedTuple):
    """What one pass over a batch gives beside the sum of its losses."""

    sums: Sums
    pairs: PairScores | None  # None in supervised fine-tuning


LossSums = Callable[..., tuple[Array, BatchSums]]
_NOTHING = StepInputs()


def sft_sums(config: RunConfig) -> LossSums:
    """Loss sum and metric sums of a batch of dialogues (`Rows`); the weight counts targets."""

    def sums(params: Params, rows: Rows, given: StepInputs = _NOTHING) -> tuple[Array, BatchSums]:
        scores = policy_scores(config, params, rows, given, branched=False)
        _, info = sft_loss(scores.logps, rows.loss_mask)
        named = {
            "loss": info.sum,
            "weight": info.weight,
            "tokens": (rows.segments > 0).sum(dtype=jnp.float32),
            "target_tokens": info.weight,
        }
        return info.sum, BatchSums(named, None)

    return sums


def preference_sums(config: RunConfig) -> LossSums:
    """Loss sum and metric sums of a `PreferenceBatch`; the weight counts pairs.

    Rewards are beta times log-prob less the reference's, whatever the loss, as TRL reports them.
    """
    dpo, loss = config.dpo, loss_of(config)
    assert dpo is not None

    def sums(
        params: Params, batch: PreferenceBatch, given: StepInputs = _NOTHING
    ) -> tuple[Array, BatchSums]:
        scores, mask = pair_scores(config, loss, params, batch, given)
        rewards = dpo.beta * jax.lax.stop_gradient(scores.logps - batch.ref_logps)
        margins = rewards[..., 0] - rewards[..., 1]
        chosen, rejected = scores.logps[..., 0], scores.logps[..., 1]

        def total(values):
            return jnp.where(mask, values.astype(jnp.float32), 0.0).sum()

        named = {
            "loss": total(scores.losses),
            "weight": mask.sum(dtype=jnp.float32),
            "tokens": (batch.rows.segments > 0).sum(dtype=jnp.float32),
            "target_tokens": batch.rows.loss_mask.sum(dtype=jnp.float32),
            "rewards/chosen": total(rewards[..., 0]),
            "rewards/rejected": total(rewards[..., 1]),
            "rewards/margins": total(margins),
            "rewards/accuracies": total(margins > 0),
            "rewards/ties": total(margins == 0),
            "logps/accuracies": total(chosen > rejected),
            "logps/chosen": total(chosen),
            "logps/rejected": total(rejected),
        }
        return named["loss"], BatchSums(named, scores)

    return sums


def loss_sums(config: RunConfig) -> LossSums:
    """The sums of the run's stage."""
    return preference_sums(config) if config.dpo else sft_sums(config)


def train_step(
    sums: LossSums,
    optimizer: optax.GradientTransformation,
    n_micro: int,
    *,
    dropout_seed: int | None = None,
    shift_decay: float = 1.0,
) -> Callable[..., tuple[TrainState, Sums]]:
    """The step `(state, batch, base=None) -> (state, metric sums)`, to be jitted, state donated.

    Args:
        sums: the loss.
        optimizer: of the parameters that are trained.
        n_micro: portions of a batch.
        dropout_seed: of the adapters' dropout, of which every step and portion has its own; None:
            no dropout.
        shift_decay: of the mean reward, where the state has one.
    """
    grad = jax.value_and_grad(sums, has_aux=True)

    def step(state: TrainState, batch: Any, base: Params | None = None) -> tuple[TrainState, Sums]:
        shift = 0.0 if state.shift is None else state.shift.delta

        def add(carry, portion):
            number, part = portion
            key = None
            if dropout_seed is not None:
                key = jax.random.key(dropout_seed)
                key = jax.random.fold_in(jax.random.fold_in(key, state.step), number)
            (_, aux), grads = grad(state.params, part, StepInputs(base, key, shift))
            return jax.tree.map(jnp.add, carry, (grads, aux.sums)), None

        portions = micro_batches(batch, n_micro)
        first = jax.tree.map(lambda x: x[0], portions)
        info = jax.eval_shape(sums, state.params, first, StepInputs(base))[1].sums
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, info))
        (grads, info), _ = jax.lax.scan(add, zeros, (jnp.arange(n_micro), portions))
        weight = jnp.maximum(info["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        info["grad_norm"] = optax.tree.norm(grads) * info["weight"]
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
        after = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        if isinstance(state.shift, RewardShift):
            rewards = info["rewards/chosen"] + info["rewards/rejected"]
            after = after._replace(
                shift=update_shift(state.shift, rewards, info["weight"], shift_decay)
            )
        return after, info

    return step


def eval_step(sums: LossSums, n_micro: int) -> Callable[..., BatchSums]:
    """The evaluation `(params, batch, given) -> BatchSums`, in the training step's portions."""

    def step(params: Params, batch: Any, given: StepInputs = _NOTHING) -> BatchSums:
        each = jax.lax.map(
            lambda portion: sums(params, portion, given)[1], micro_batches(batch, n_micro)
        )
        total = jax.tree.map(lambda x: x.sum(axis=0), each.sums)
        return BatchSums(total, in_order(each.pairs))

    return step


def move_reference(reference: Params, params: Params, share: float) -> Params:
    """The reference after a move towards the policy: share params + (1 - share) reference.

    Gorbatovski et al. 2024 (TR-DPO), arXiv:2404.09656, the soft update; a share of 1 is the hard.
    """
    return jax.tree.map(lambda r, p: share * p + (1 - share) * r, reference, params)
