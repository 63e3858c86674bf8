"""Log-probs of the target tokens of packed rows."""

from __future__ import annotations

from jaxtyping import PRNGKeyArray

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.head import TokenScores, head_scores
from zephyr_jax.models.mistral import hidden_states
from zephyr_jax.types import Params, Rows


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
