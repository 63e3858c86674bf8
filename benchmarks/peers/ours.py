"""Our side of the race."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import work

import zephyr_jax as zj
from zephyr_jax.chips import keep_freed_memory
from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.inference.decoding import cast_params, decode
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.training.optim import make_optimizer
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.training.steps import initial_state, loss_sums, train_step
from zephyr_jax.types import PreferenceBatch, Rows
from zephyr_jax.weights.huggingface import hf_layout


class _Reader:
    def __init__(self, weights: dict[str, np.ndarray]):
        self._weights = weights

    def read(self, name: str, index: Any = ()) -> np.ndarray:
        return self._weights[name][tuple(index)]


def make(kind: str, shape: work.Shape, weights: Any, data: Any) -> dict[str, work.Step]:
    """The steps of one kind of work."""
    if not kind.startswith("generate"):
        keep_freed_memory()  # as `train` does; before JAX starts its threads
    cfg = zj.MistralConfig.from_hf({"model_type": "mistral", **work.hf_config(shape)})
    cfg = dataclasses.replace(cfg, dtype="float32")
    params = hf_layout(cfg).read(_Reader(weights), "float32", param_shardings(cfg))
    if kind.startswith("generate"):
        rows = data["prompts"].tolist()

        def run(n: int) -> float:
            chunks = decode(cfg, cast_params(cfg, params), rows, SamplingParams(max_new_tokens=n))
            return float(sum(int(tokens.sum()) for tokens, _ in chunks))

        return {"prefill": lambda: run(1), "whole": lambda: run(work.NEW)}
    recipe = load_config("zephyr_7b_dpo" if kind.startswith("dpo") else "zephyr_7b_sft")
    train = dataclasses.replace(recipe.train, micro_batches=1, remat="none")
    dpo = recipe.dpo and dataclasses.replace(recipe.dpo, beta=work.BETA)
    optim = dataclasses.replace(recipe.optim, name="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    config = dataclasses.replace(recipe, model=cfg, train=train, dpo=dpo, optim=optim)
    if kind == "sft":
        tokens = jnp.asarray(data["tokens"])
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(shape.length, dtype=jnp.int32), tokens.shape)
        batch: Any = Rows(tokens, ones, positions, jnp.zeros_like(tokens), ones > 0)
        return {"step": _step(config, params, batch)}
    documents = [
        packing.pair_document(prompt, chosen, rejected, number)
        for number, (prompt, chosen, rejected) in enumerate(work.pairs_of(data), 1)
    ]
    lengths = [len(document.tokens) for document in documents]
    room = max(*lengths, 512)
    bins = packing.best_fit(lengths, room)
    most = max(map(len, bins))
    rows = np.stack([packing.build_row([documents[i] for i in own], room, most) for own in bins])
    packed = Rows(*map(jnp.asarray, packing.row_arrays(rows)))
    score = jax.jit(functools.partial(reference_logps, cfg, n_pairs=most))
    batch = PreferenceBatch(packed, jnp.asarray(rows["pair_ids"] != 0), score(params, packed))

    def reference() -> float:
        return float(score(params, packed).sum())

    return {"step": _step(config, jax.tree.map(jnp.copy, params), batch), "reference": reference}


def _step(config: RunConfig, params: Any, batch: Any) -> work.Step:
    optimizer = make_optimizer(config.optim, lambda _: work.LEARNING_RATE)
    step = jax.jit(train_step(loss_sums(config), optimizer, 1), donate_argnums=0)
    state = initial_state(config, optimizer, params)

    def run() -> float:
        nonlocal state
        state, info = step(state, batch)
        jax.block_until_ready(state)
        return float(info["loss"] / info["weight"])

    return run


if __name__ == "__main__":
    work.take_turns(make, ("jax", "zephyr_jax"))
