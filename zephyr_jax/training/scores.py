"""From parameters and packed rows to log-probs: of tokens, of answers, and the losses of pairs.

Training, evaluation and the frozen reference all score by these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zephyr_jax.config.run import MistralConfig, RunConfig
from zephyr_jax.losses.pairs import Loss, PairLogps, ld_logps, wpo_weights
from zephyr_jax.losses.tokens import pair_logps
from zephyr_jax.models.head import TokenScores
from zephyr_jax.models.options import INFERENCE, ForwardOptions
from zephyr_jax.models.scoring import token_scores
from zephyr_jax.sharding import spec
from zephyr_jax.types import Params, PreferenceBatch, Rows


class StepInputs(NamedTuple):
    """What a step reads beside the parameters that it trains, and its batch."""

    base: Params | None = None  # frozen parameters, where adapters beside them are trained
    key: PRNGKeyArray | None = None  # of the adapters' dropout; None: there is none
    shift: Float[Array, ""] | float = 0.0  # the mean reward so far (`PairLogps.shift`)


class PairScores(NamedTuple):
    """What is known of every pair of a batch; 0 where a row has no pair."""

    losses: Float[Array, "B K"]
    logps: Float[Array, "B K 2"]  # of the chosen and the rejected answer, nats
    tokens: Float[Array, "B K 2"]  # how many were summed


def policy_scores(
    config: RunConfig,
    params: Params,
    rows: Rows,
    given: StepInputs,
    *,
    branched: bool,
    squares: bool = False,
) -> TokenScores:
    """`token_scores` of what the run trains, as its configuration has them computed."""
    train = config.train
    return token_scores(
        config.model,
        params if given.base is None else given.base,
        rows,
        ForwardOptions(
            remat=train.remat,
            reduce_dtype=train.reduce_dtype,
            attention=train.attention,
            adapters=None if given.base is None else params,
            lora=config.lora,
            dropout_key=given.key,
        ),
        branched=branched,
        squares=squares,
    )


def answer_sums(
    logps: Float[Array, "B T"], rows: Rows, n_pairs: int, ld_alpha: float = 1.0
) -> tuple[Float[Array, "B K 2"], Float[Array, "B K 2"]]:
    """Every answer's summed log-probs, and its number of target tokens.

    With `ld_alpha` below 1 the tokens by which an answer is the longer of its pair count so much
    (`ld_logps`).
    """
    tokens = pair_logps(rows.loss_mask.astype(jnp.float32), rows.segments, rows.branches, n_pairs)
    whole = pair_logps(logps, rows.segments, rows.branches, n_pairs)
    if ld_alpha == 1:
        return whole, tokens
    inside = jnp.where(_rank(rows) < _shorter(rows, tokens), logps, 0.0)
    shared = pair_logps(inside, rows.segments, rows.branches, n_pairs)
    return ld_logps(shared, whole - shared, ld_alpha), tokens


def _rank(rows: Rows) -> Float[Array, "B T"]:
    """How many targets of its own answer stand before each token."""
    mask = rows.loss_mask.astype(jnp.float32)
    before = jnp.cumsum(mask, axis=1) - mask
    part = 4 * rows.segments + rows.branches
    begins = part != jnp.pad(part[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return before - jax.lax.cummax(jnp.where(begins, before, 0.0), axis=1)


def _shorter(rows: Rows, tokens: Float[Array, "B K 2"]) -> Float[Array, "B T"]:
    """For each token the number of targets of the shorter answer of its pair."""
    document = rows.segments[:, :, None] == jnp.arange(1, tokens.shape[1] + 1)[None, None]
    return jnp.where(document, tokens.min(axis=-1)[:, None], 0.0).sum(axis=-1)


def reference_logps(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    n_pairs: int,
    n_micro: int = 1,
    ld_alpha: float = 1.0,
    options: ForwardOptions = INFERENCE,
) -> Float[Array, "B K 2"]:
    """Summed log-probs of each pair's answers, in the portions in which the step computes them.

    Products of other shapes, and other implementations of attention, are rounded in another
    order, and would differ in the last bits.
    """

    def score(portion: Rows) -> Array:
        scores = token_scores(cfg, params, portion, options)
        return answer_sums(scores.logps, portion, n_pairs, ld_alpha)[0]

    return in_order(jax.lax.map(score, micro_batches(rows, n_micro)))


def micro_batches(batch, n: int):
    """Every array `B ...` as `n B/n ...`: portion i takes rows i, i+n, i+2n and so on.

    The other order of reshaping would divide the portions over the devices, not the rows.
    """

    def split(x: Array) -> Array:
        rows, *rest = jax.typeof(x).sharding.spec
        divided = PartitionSpec(rows, None, *rest) if spec("") is not None else None
        shape = (x.shape[0] // n, n, *x.shape[1:])
        return jnp.reshape(x, shape, out_sharding=divided).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def in_order(portions):
    """The rows of `micro_batches` in their own order again."""
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), portions
    )


def pair_scores(
    config: RunConfig, loss: Loss, params: Params, batch: PreferenceBatch, given: StepInputs
) -> tuple[PairScores, Bool[Array, "B K"]]:
    """The scores of a batch's pairs, and which of them there are."""
    dpo, rows, mask = config.dpo, batch.rows, batch.pair_mask
    assert dpo is not None
    n_pairs = mask.shape[1]
    each = policy_scores(config, params, rows, given, branched=True, squares=dpo.wpo)
    sums, tokens = answer_sums(each.logps, rows, n_pairs, dpo.ld_alpha)
    ref = batch.ref_logps
    pairs = PairLogps(
        *(sums[..., 0], sums[..., 1], ref[..., 0], ref[..., 1], tokens[..., 0], tokens[..., 1]),
        shift=given.shift,
    )
    losses = loss(pairs, dpo, mask)
    if each.squares is not None:
        aligned, _ = answer_sums(each.logps - each.squares, rows, n_pairs)
        losses *= wpo_weights(aligned[..., 0], aligned[..., 1], tokens[..., 0], tokens[..., 1])
    return PairScores(jnp.where(mask, losses, 0.0), sums, tokens), mask
