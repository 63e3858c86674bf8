"""levanter: SFT of its Mistral with its own loss and optimizer."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import work
from haliax.state_dict import from_torch_compatible_state_dict
from levanter.layers.attention import AttentionMask
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.models.mistral import MistralConfig, MistralLMHeadModel
from levanter.optim import AdamConfig


def make(kind: str, shape: work.Shape, weights: Any, data: Any) -> dict[str, work.Step]:
    """The step of SFT."""
    if kind != "sft":
        raise SystemExit(f"levanter has no {kind}")
    config = MistralConfig(
        seq_len=shape.length,
        hidden_dim=shape.width,
        intermediate_dim=shape.ffn,
        num_layers=work.LAYERS,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        layer_norm_epsilon=work.EPS,
        rope=DefaultRotaryEmbeddingsConfig(theta=work.THETA),
        gradient_checkpointing=False,
    )
    vocabulary = hax.Axis("vocab", work.VOCAB)
    empty = eqx.filter_eval_shape(
        MistralLMHeadModel.init, vocabulary, config, key=jax.random.key(0)
    )
    arrays = {name: jnp.asarray(array) for name, array in weights.items()}
    model = from_torch_compatible_state_dict(empty, arrays)
    tokens = hax.named(jnp.asarray(data["tokens"]), ("batch", config.Pos))
    settings = {"beta2": 0.999, "weight_decay": 0.0, "learning_rate": work.LEARNING_RATE}
    settings |= {"lr_schedule": "constant", "warmup": 0.0}
    optimizer = AdamConfig(**settings).build(1000)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_of(model: Any, tokens: Any) -> Any:
        batch = tokens.resolve_axis("batch")
        mask = hax.broadcast_axis(LmExample.causal_loss_mask(config.Pos), batch)
        example = LmExample(tokens=tokens, loss_mask=mask, attn_mask=AttentionMask.causal())
        return compute_next_token_loss(model, example).scalar()

    @eqx.filter_jit(donate="all-except-first")
    def step(tokens: Any, model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, tokens)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    def run() -> float:
        nonlocal model, state
        model, state, loss = step(tokens, model, state)
        return float(jax.block_until_ready((loss, jax.tree.leaves(model)))[0])

    return {"step": run}


if __name__ == "__main__":
    work.take_turns(make, ("jax", "levanter", "haliax"))
