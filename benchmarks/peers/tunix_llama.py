"""tunix: its Llama, which is a Mistral without a window; SFT, DPO and generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl import common
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig


def llama(shape: work.Shape, weights: Any) -> Any:
    """The model with these weights."""
    config = ModelConfig(
        num_layers=work.LAYERS,
        vocab_size=work.VOCAB,
        embed_dim=shape.width,
        hidden_dim=shape.ffn,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        rope_theta=int(work.THETA),
        norm_eps=work.EPS,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))

    def put(param: Any, name: str, *size: int) -> None:
        array = weights[name]
        array = array.T.reshape(size) if size else array
        assert param.value.shape == array.shape, (name, param.value.shape, array.shape)
        param.value = jnp.asarray(array)

    d, h = shape.width, shape.head_dim
    put(model.embedder.input_embedding, "model.embed_tokens.weight")
    put(model.final_norm.w, "model.norm.weight")
    put(model.lm_head.w, "lm_head.weight", d, work.VOCAB)
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}"
        put(layer.input_layernorm.w, f"{at}.input_layernorm.weight")
        put(layer.post_attention_layernorm.w, f"{at}.post_attention_layernorm.weight")
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            proj = getattr(layer.attn, f"{name}_proj")
            put(proj.w, f"{at}.self_attn.{name}_proj.weight", d, heads, h)
        put(layer.attn.o_proj.w, f"{at}.self_attn.o_proj.weight", shape.heads, h, d)
        for name in ("gate", "up", "down"):
            kernel = getattr(layer.mlp, f"{name}_proj").kernel
            put(kernel, f"{at}.mlp.{name}_proj.weight", *kernel.value.shape)
    return model


class _Ids:
    """A tokenizer whose texts are the numbers of prompts."""

    def __init__(self, prompts: np.ndarray):
        self._prompts = prompts

    def encode(self, text: str) -> list[int]:
        return self._prompts[int(text)].tolist()

    def decode(self, ids: list[int]) -> str:
        return str(len(ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return work.VOCAB  # never drawn

    def pad_id(self) -> int:
        return 0


def make(kind: str, shape: work.Shape, weights: Any, data: Any) -> dict[str, work.Step]:
    """The steps of one kind of work."""
    model = llama(shape, weights)
    if kind.startswith("generate"):
        return generation(model, shape, data["prompts"])
    adamw = optax.adamw(work.LEARNING_RATE, b1=0.9, b2=0.999, weight_decay=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    if kind == "sft":
        trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=1000))
        tokens = jnp.asarray(data["tokens"])
        mask = jnp.ones(tokens.shape, bool)
        inputs = {
            "input_tokens": tokens,
            "input_mask": mask,
            "positions": common.build_positions_from_mask(mask),
            "attention_mask": common.make_causal_attn_mask(mask),
        }
        trainer = trainer.with_gen_model_input_fn(lambda x: x)
        return {"step": _step(trainer, lambda: inputs)}
    reference = llama(shape, weights)
    settings = DPOTrainingConfig(eval_every_n_steps=1000, beta=work.BETA)
    trainer = DPOTrainer(model, reference, optimizer, settings)
    batch = {}
    for name in ("prompt", "chosen", "rejected"):
        column = {"prompt": 0, "chosen": 1, "rejected": 2}[name]
        lengths = data["lengths"][:, column]
        index = np.arange(lengths.max())[None]
        mask = index < lengths[:, None]
        ids = np.where(mask, data[name][:, : lengths.max()], 0)
        if name == "prompt":  # padded on the left
            start = lengths.max() - lengths[:, None]
            ids = np.take_along_axis(ids, (index - start) % lengths.max(), axis=1)
            mask = index >= start
        batch |= {f"{name}_ids": ids, f"{name}_mask": mask.astype(np.int32)}
    width = max(batch["chosen_ids"].shape[1], batch["rejected_ids"].shape[1])
    for name in ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"):
        batch[name] = np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1])))
    example = TrainingInput(**{name: jnp.asarray(array) for name, array in batch.items()})
    # The pass of the live reference is in `_prepare_inputs`.
    return {"step": _step(trainer, lambda: trainer._prepare_inputs(example))}


def _step(trainer: Any, inputs: Any) -> work.Step:
    step, _ = trainer.jit_train_and_eval_step()

    def run() -> float:
        loss, *_ = step(inputs())
        jax.block_until_ready(nnx.state(trainer.model))
        return float(loss)

    return run


def generation(model: Any, shape: work.Shape, prompts: np.ndarray) -> dict[str, work.Step]:
    """Greedy replies by its sampler."""
    room = work.PROMPT + work.NEW
    cache = CacheConfig(room, work.LAYERS, shape.kv_heads, shape.head_dim)
    sampler = Sampler(model, _Ids(prompts), cache)
    names = [str(i) for i in range(len(prompts))]

    def run(n: int) -> float:
        out = sampler(names, max_generation_steps=n, max_prompt_length=work.PROMPT)
        return float(sum(int(np.asarray(tokens).sum()) for tokens in out.tokens))

    return {"prefill": lambda: run(1), "whole": lambda: run(work.NEW)}


if __name__ == "__main__":
    work.take_turns(make, ("jax", "google-tunix", "flax"))
