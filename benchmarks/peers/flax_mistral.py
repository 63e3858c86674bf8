"""FlaxMistral, which transformers had until 4.57: SFT and generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import work
from flax.traverse_util import unflatten_dict
from transformers import FlaxMistralForCausalLM, MistralConfig


def make(kind: str, shape: work.Shape, weights: Any, data: Any) -> dict[str, work.Step]:
    """The steps of one kind of work."""
    if kind.startswith("dpo"):
        raise SystemExit(f"transformers' Flax has no {kind}")
    config = MistralConfig(**{**work.hf_config(shape), "sliding_window": 4096}, pad_token_id=0)
    model: Any = FlaxMistralForCausalLM(config, input_shape=(1, 8), _do_init=False)
    flat = {}
    for name, array in weights.items():
        *path, _ = name.split(".")
        if path[-1] == "embed_tokens":
            flat[(*path, "embedding")] = array
        elif "norm" in path[-1]:
            flat[(*path, "weight")] = array
        else:
            flat[(*path, "kernel")] = array.T
    params = unflatten_dict({path: jnp.asarray(array) for path, array in flat.items()})
    if kind.startswith("generate"):
        prompts = jnp.asarray(data["prompts"])

        mask = jnp.ones_like(prompts)

        def compiled(n: int) -> Any:
            settings = {"max_length": work.PROMPT + n, "do_sample": False}
            settings["eos_token_id"] = work.VOCAB  # never drawn

            def generate(params: Any, ids: Any, mask: Any) -> Any:
                return model.generate(ids, attention_mask=mask, params=params, **settings).sequences

            return jax.jit(generate)

        programs = {n: compiled(n) for n in (1, work.NEW)}

        def run(n: int) -> float:
            return float(programs[n](params, prompts, mask)[:, work.PROMPT :].sum())

        return {"prefill": lambda: run(1), "whole": lambda: run(work.NEW)}
    return {"step": training(model, params, jnp.asarray(data["tokens"]))}


def training(model: Any, params: Any, tokens: Any) -> work.Step:
    """A step of SFT."""
    adamw = optax.adamw(work.LEARNING_RATE, b1=0.9, b2=0.999, weight_decay=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = optimizer.init(params)

    def loss_of(params: Any) -> Any:
        logits = model(tokens, params=params).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run() -> float:
        nonlocal params, state
        params, state, loss = jax.block_until_ready(step(params, state))
        return float(loss)

    return run


if __name__ == "__main__":
    work.take_turns(make, ("jax", "transformers", "flax"))
