"""Log-probs of the target tokens of packed rows."""

from __future__ import annotations

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.models.head import TokenScores, head_scores
from zephyr_jax.models.mistral import as_module
from zephyr_jax.models.options import INFERENCE, ForwardOptions
from zephyr_jax.types import Params, Rows


def token_scores(
    cfg: MistralConfig,
    params: Params,
    rows: Rows,
    options: ForwardOptions = INFERENCE,
    *,
    branched: bool = True,
    squares: bool = False,
) -> TokenScores:
    """Log-probs of the target tokens of packed rows, float32, and `squares` where wanted.

    `branched=False` promises that no row has branches, which lets attention skip work.
    """
    model = as_module(cfg, params)
    branches = rows.branches if branched else None
    hidden = model.hidden(rows.tokens, rows.segments, branches, rows.positions, options)
    weight = model.embed if cfg.tie_word_embeddings else model.head
    return head_scores(
        hidden,
        weight[...],
        rows.tokens,
        rows.loss_mask,
        tied=cfg.tie_word_embeddings,
        squares=squares,
        reduce_dtype=options.reduce_dtype,
    )
