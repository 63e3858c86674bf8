"""From parameters and packed rows to log-probs: of tokens, of answers, and the losses of pairs.

Training, evaluation and the frozen reference all score by these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from zephyr_jax.config import LoraConfig, MistralConfig, RunConfig
from zephyr_jax.config_checks import weighted_names
from zephyr_jax.losses import pair_logps
from zephyr_jax.models.head import TokenScores, head_scores
from zephyr_jax.models.mistral import hidden_states
from zephyr_jax.preference_inputs import (
    Loss,
    PairLogps,
    ld_logps,
    wpo_weights,
)
from zephyr_jax.preference_losses import ACROSS_BATCH, combined
from zephyr_jax.reference_free_losses import REFERENCE_FREE
from zephyr_jax.sharding import spec
from zephyr_jax.types import Params, PreferenceBatch, Rows


class Given(NamedTuple):
    """What a step reads beside the parameters that it trains, and its batch."""

    base: Params | None = None  # frozen parameters, where adapters beside them are trained
    key: PRNGKeyArray | None = None  # of the adapters' dropout; None: there is none
    shift: Float[Array, ""] | float = 0.0  # the mean reward so far (`PairLogps.shift`)


class PairScores(NamedTuple):
    """What is known of every pair of a batch; 0 where a row has no pair."""

    losses: Float[Array, "B K"]
    logps: Float[Array, "B K 2"]  # of the chosen and the rejected answer, nats
    tokens: Float[Array, "B K 2"]  # how many were summed


def token_scores(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    *,
    branched: bool = True,
    squares: bool = False,
    remat: str = "none",
    reduce_dtype: str = "float32",
    attention: str = "auto",
    adapters: Params | None = None,
    lora: LoraConfig | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> TokenScores:
    """Log-probs of the target tokens of packed rows, float32, and `squares` where they are wanted.

    `branched=False` says that no row has branches, which attention may then do without. The other
    settings are those of `forward` and `hidden_states`.
    """
    hidden = hidden_states(
        cfg,
        params,
        rows.tokens,
        rows.segments,
        rows.branches if branched else None,
        rows.positions,
        remat=remat,
        reduce_dtype=reduce_dtype,
        attention=attention,
        adapters=adapters,
        lora=lora,
        dropout_key=dropout_key,
    )
    return head_scores(
        hidden,
        params["embed" if cfg.tie_word_embeddings else "head"],
        rows.tokens,
        rows.loss_mask,
        tied=cfg.tie_word_embeddings,
        squares=squares,
        reduce_dtype=reduce_dtype,
    )


def policy_scores(
    config: RunConfig,
    params: Params,
    rows: Rows,
    given: Given,
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
        branched=branched,
        squares=squares,
        remat=train.remat,
        reduce_dtype=train.reduce_dtype,
        attention=train.attention,
        adapters=None if given.base is None else params,
        lora=config.lora,
        dropout_key=given.key,
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
    attention: str = "auto",
    ld_alpha: float = 1.0,
    lora: LoraConfig | None = None,
    adapters: Params | None = None,
) -> Float[Array, "B K 2"]:
    """Summed log-probs of each pair's answers, in the portions in which the step computes them.

    Products of other shapes, and other implementations of attention, are rounded in another
    order, and would differ in the last bits.
    """

    def score(portion: Rows) -> Array:
        scores = token_scores(
            cfg, params, portion, attention=attention, adapters=adapters, lora=lora
        )
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


def loss_of(config: RunConfig) -> Loss:
    """The loss of the run's preference stage.

    Raises:
        ValueError: if a name is unknown, or an option or another part of the configuration does
            not go with the loss.
    """
    dpo = config.dpo
    assert dpo is not None
    names = weighted_names("dpo.loss", dpo.loss)
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


def pair_scores(
    config: RunConfig, loss: Loss, params: Params, batch: PreferenceBatch, given: Given
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
