"""From parameters and packed rows to log-probs and losses, also for evaluation and reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import RunConfig
from zephyr_jax.losses import pairs
from zephyr_jax.losses.preference import loss_of
from zephyr_jax.losses.tokens import pair_logps, sft_loss
from zephyr_jax.models.head import TokenScores
from zephyr_jax.models.mistral import INFERENCE, ForwardOptions, token_scores
from zephyr_jax.sharding import spec
from zephyr_jax.types import Params, PreferenceBatch, Rows


class StepInputs(NamedTuple):
    """What a step reads in addition to the parameters that it trains and its batch."""

    base: Params | None = None  # the frozen parameters, if adapters are trained
    key: PRNGKeyArray | None = None  # of the adapters' dropout; None: no dropout
    shift: Float[Array, ""] | float | None = 0.0  # `PairLogps.shift`


class PairScores(NamedTuple):
    """The values of every pair of a batch; 0 where a row has no pair."""

    losses: Float[Array, "B K"]
    logps: Float[Array, "B K 2"]  # of the chosen and the rejected answer, nats
    tokens: Float[Array, "B K 2"]  # how many were summed


Sums = dict[str, Array]  # name -> float32 sum; "weight" is what the loss is divided by


class BatchSums(NamedTuple):
    """The metrics of one pass over a batch."""

    sums: Sums
    pairs: PairScores | None  # None in supervised fine-tuning


LossSums = Callable[..., tuple[Array, BatchSums]]
NO_INPUTS = StepInputs()


def policy_scores(
    config: RunConfig, params: Params, rows: Rows, inputs: StepInputs, *, squares: bool = False
) -> TokenScores:
    """`token_scores` under the trained parameters: the whole model, or adapters of a frozen one."""
    named = {x: getattr(config.train, x) for x in ("remat", "reduce_dtype", "attention")}
    options = ForwardOptions(lora=config.lora, **named)
    if inputs.base is not None:
        options = dataclasses.replace(options, adapters=params, dropout_key=inputs.key)
        params = inputs.base
    branched = config.dpo is not None
    return token_scores(config.model, params, rows, options, branched=branched, squares=squares)


def answer_sums(
    logps: Float[Array, "B T"], rows: Rows, n_pairs: int, ld_alpha: float = 1.0
) -> tuple[Float[Array, "B K 2"], Float[Array, "B K 2"]]:
    """Every answer's summed log-probs, those of `ld_logps`, and its number of target tokens."""
    tokens = pair_logps(rows.loss_mask.astype(jnp.float32), rows.segments, rows.branches, n_pairs)
    whole = pair_logps(logps, rows.segments, rows.branches, n_pairs)
    if ld_alpha == 1:
        return whole, tokens
    inside = jnp.where(_within_shorter(rows, tokens), logps, 0.0)
    shared = pair_logps(inside, rows.segments, rows.branches, n_pairs)
    return pairs.ld_logps(shared, whole - shared, ld_alpha), tokens


def _within_shorter(rows: Rows, tokens: Float[Array, "B K 2"]) -> Bool[Array, "B T"]:
    """Whether fewer targets of its answer stand before a token than the shorter answer has."""
    mask = rows.loss_mask.astype(jnp.float32)
    before = jnp.cumsum(mask, axis=1) - mask
    part = 4 * rows.segments + rows.branches
    begins = part != jnp.pad(part[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    rank = before - jax.lax.cummax(jnp.where(begins, before, 0.0), axis=1)
    document = rows.segments[:, :, None] == jnp.arange(1, tokens.shape[1] + 1)[None, None]
    return rank < jnp.where(document, tokens.min(axis=-1)[:, None], 0.0).sum(axis=-1)


def reference_logps(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    n_pairs: int,
    n_micro: int = 1,
    ld_alpha: float = 1.0,
    options: ForwardOptions = INFERENCE,
) -> Float[Array, "B K 2"]:
    """Summed log-probs of each pair's answers, in the training step's micro-batches.

    Products of other shapes are rounded in another order, and would differ in the last bits.
    """

    def score(part: Rows) -> Array:
        scores = token_scores(cfg, params, part, options)
        return answer_sums(scores.logps, part, n_pairs, ld_alpha)[0]

    return in_order(jax.lax.map(score, micro_batches(rows, n_micro)))


def micro_batches(batch, n: int):
    """Every array `B ...` as `n B/n ...`; micro-batch i has rows i, i+n, ... and stays sharded."""

    def split(x: Array) -> Array:
        # JAX would leave out mesh axes of one device, which shard_map looks for.
        rows, *rest = jax.typeof(x).sharding.spec
        sharding = PartitionSpec(rows, None, *rest) if spec("") is not None else None
        shape = (x.shape[0] // n, n, *x.shape[1:])
        return jnp.reshape(x, shape, out_sharding=sharding).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def in_order(parts):
    """The rows of `micro_batches` in their own order again."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def pair_scores(
    config: RunConfig, dpo: DpoConfig, params: Params, batch: PreferenceBatch, inputs: StepInputs
) -> PairScores:
    """The losses and log-probs of a batch's pairs."""
    rows, mask, ref = batch.rows, batch.pair_mask, batch.ref_logps
    loss, n_pairs = loss_of(dpo, config.train.micro_batches), mask.shape[1]
    each = policy_scores(config, params, rows, inputs, squares=bool(dpo.option("wpo")))
    sums, tokens = answer_sums(each.logps, rows, n_pairs, dpo.option("ld_alpha"))
    both = (x[..., answer] for x in (sums, ref, tokens) for answer in (0, 1))
    logps = pairs.PairLogps(*both, shift=inputs.shift, desirable=batch.desirable)
    losses = loss(logps, dpo, mask)
    if each.squares is not None:
        aligned, _ = answer_sums(each.logps - each.squares, rows, n_pairs)
        losses *= pairs.wpo_weights(aligned, tokens)
    return PairScores(jnp.where(mask, losses, 0.0), sums, tokens)


def loss_sums(config: RunConfig) -> LossSums:
    """The function `(params, batch, inputs) -> (loss sum, BatchSums)` of the run's stage.

    A batch of dialogues is `Rows`, and its weight counts targets; a `PreferenceBatch` counts pairs.
    """
    dpo = config.dpo

    def sums(params: Params, batch: Any, inputs: StepInputs = NO_INPUTS) -> Any:
        rows = batch.rows if dpo else batch
        named = {"tokens": (rows.segments > 0).sum(dtype=jnp.float32)}
        named["target_tokens"] = rows.loss_mask.sum(dtype=jnp.float32)
        if dpo is None:
            scores = policy_scores(config, params, rows, inputs)
            _, info = sft_loss(scores.logps, rows.loss_mask)
            return info.sum, BatchSums(named | {"loss": info.sum, "weight": info.weight}, None)
        mask, scores = batch.pair_mask, pair_scores(config, dpo, params, batch, inputs)
        logps = jax.lax.stop_gradient(scores.logps)
        named |= {"weight": mask.sum(dtype=jnp.float32), "loss": scores.losses.sum()}
        metrics = pairs.preference_metrics(logps, batch.ref_logps, dpo.beta)
        if dpo.labeled:
            good = (batch.desirable & mask).astype(jnp.float32)
            metrics = pairs.label_metrics(logps, batch.ref_logps, good, dpo.beta)
        for name, values in metrics.items():
            named[name] = jnp.where(mask, values.astype(jnp.float32), 0.0).sum()
        return named["loss"], BatchSums(named, scores)

    return sums
