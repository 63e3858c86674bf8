"""One training step, one evaluation step: pure functions that `jax.jit` compiles.

SFT and DPO differ in one function, from parameters and a batch to sums. Gradients of sums are
added over micro-batches in float32 and divided once by the whole weight, so how a batch is cut
changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from zephyr_jax.config import MistralConfig, RunConfig
from zephyr_jax.losses import dpo_loss, pair_logps, sft_loss, token_logps
from zephyr_jax.models.mistral import forward
from zephyr_jax.types import Params, PreferenceBatch, Rows, TrainState

Sums = dict[str, Array]  # name -> float32 sum; "weight" is what the loss is divided by
LossSums = Callable[[Params, Any], tuple[Array, Sums]]


def rows_logps(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    *,
    branched: bool = True,
    remat: str = "none",
    reduce_dtype: str = "float32",
    attention: str = "auto",
) -> Float[Array, "B T"]:
    """Log-probs of every target token of packed rows, float32.

    `branched=False` says that no row has branches, which attention may then do without; the
    other settings are those of `forward`.
    """
    logits = forward(
        cfg,
        params,
        rows.tokens,
        rows.segments,
        rows.branches if branched else None,
        rows.positions,
        remat=remat,
        reduce_dtype=reduce_dtype,
        attention=attention,
    )
    return token_logps(logits, rows.tokens, rows.loss_mask)


def _policy_logps(config: RunConfig, params: Params, rows: Rows, *, branched: bool) -> Array:
    """`rows_logps` as the run's configuration has them computed."""
    train = config.train
    return rows_logps(
        config.model,
        params,
        rows,
        branched=branched,
        remat=train.remat,
        reduce_dtype=train.reduce_dtype,
        attention=train.attention,
    )


def reference_logps(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    n_pairs: int,
    n_micro: int = 1,
    attention: str = "auto",
) -> Float[Array, "B K 2"]:
    """Summed log-probs of each pair's answers, in the portions in which the step computes them.

    Products of other shapes, and other implementations of attention, are rounded in another
    order, and would differ in the last bits.
    """

    def score(portion: Rows) -> Array:
        logps = rows_logps(cfg, params, portion, attention=attention)
        return pair_logps(logps, portion.segments, portion.branches, n_pairs)

    out = jax.lax.map(score, micro_batches(rows, n_micro))
    return out.swapaxes(0, 1).reshape(rows.tokens.shape[0], n_pairs, 2)


def sft_sums(config: RunConfig) -> LossSums:
    """Loss sum and metric sums of a batch of dialogues (`Rows`); the weight counts targets."""

    def sums(params: Params, rows: Rows) -> tuple[Array, Sums]:
        logps = _policy_logps(config, params, rows, branched=False)
        _, info = sft_loss(logps, rows.loss_mask)
        return info.sum, {
            "loss": info.sum,
            "weight": info.weight,
            "tokens": (rows.segments > 0).sum(dtype=jnp.float32),
            "target_tokens": info.weight,
        }

    return sums


def dpo_sums(config: RunConfig) -> LossSums:
    """Loss sum and metric sums of a `PreferenceBatch`; the weight counts pairs."""
    dpo = config.dpo
    assert dpo is not None

    def sums(params: Params, batch: PreferenceBatch) -> tuple[Array, Sums]:
        rows, mask = batch.rows, batch.pair_mask
        logps = _policy_logps(config, params, rows, branched=True)
        pairs = pair_logps(logps, rows.segments, rows.branches, mask.shape[1])
        chosen, rejected = pairs[..., 0], pairs[..., 1]
        _, info = dpo_loss(
            chosen,
            rejected,
            batch.ref_logps[..., 0],
            batch.ref_logps[..., 1],
            beta=dpo.beta,
            label_smoothing=dpo.label_smoothing,
            weights=mask,
        )
        margins = info.chosen_rewards - info.rejected_rewards

        def total(values):
            return jnp.where(mask, values.astype(jnp.float32), 0.0).sum()

        return info.sum, {
            "loss": info.sum,
            "weight": info.weight,
            "tokens": (rows.segments > 0).sum(dtype=jnp.float32),
            "target_tokens": rows.loss_mask.sum(dtype=jnp.float32),
            "rewards/chosen": total(info.chosen_rewards),
            "rewards/rejected": total(info.rejected_rewards),
            "rewards/margins": total(margins),
            "rewards/accuracies": total(margins > 0),
            "rewards/ties": total(margins == 0),
            "logps/accuracies": total(chosen > rejected),
            "logps/chosen": total(chosen),
            "logps/rejected": total(rejected),
        }

    return sums


def loss_sums(config: RunConfig) -> LossSums:
    """The sums of the run's stage."""
    return dpo_sums(config) if config.dpo else sft_sums(config)


def micro_batches(batch: Any, n: int) -> Any:
    """Every array `B ...` as `n B/n ...`: portion i takes rows i, i+n, i+2n and so on.

    The other order of reshaping would divide the portions over the devices, not the rows.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)


def train_step(
    sums: LossSums, optimizer: optax.GradientTransformation, n_micro: int
) -> Callable[[TrainState, Any], tuple[TrainState, Sums]]:
    """The step `(state, batch) -> (state, metric sums)`, to be jitted with the state donated."""
    grad = jax.value_and_grad(sums, has_aux=True)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Sums]:
        def add(carry, portion):
            (_, info), grads = grad(state.params, portion)
            return jax.tree.map(jnp.add, carry, (grads, info)), None

        portions = micro_batches(batch, n_micro)
        first = jax.tree.map(lambda x: x[0], portions)
        info = jax.eval_shape(sums, state.params, first)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, info))
        (grads, info), _ = jax.lax.scan(add, zeros, portions)
        weight = jnp.maximum(info["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        info["grad_norm"] = optax.tree.norm(grads) * info["weight"]
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        return TrainState(state.step + 1, params, opt_state), info

    return step


def eval_step(sums: LossSums, n_micro: int) -> Callable[[Params, Any], Sums]:
    """The evaluation `(params, batch) -> metric sums`, in the training step's portions."""

    def step(params: Params, batch: Any) -> Sums:
        each = jax.lax.map(lambda portion: sums(params, portion)[1], micro_batches(batch, n_micro))
        return jax.tree.map(lambda x: x.sum(axis=0), each)

    return step
