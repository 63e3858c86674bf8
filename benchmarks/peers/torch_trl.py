"""torch and transformers: SFT and generation; TRL: DPO."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import work


def make(kind: str, shape: work.Shape, weights: Any, data: Any) -> dict[str, work.Step]:
    """The steps of one kind of work."""
    torch.set_num_threads(1)
    config = transformers.MistralConfig(**work.hf_config(shape), pad_token_id=0)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    if kind.startswith("generate"):
        return generation(model.eval(), data["prompts"])
    if kind.startswith("dpo"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return preferences(folder, work.pairs_of(data))
    settings = {"lr": work.LEARNING_RATE, "betas": (0.9, 0.999), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    ids = torch.tensor(data["tokens"], dtype=torch.long)

    def run() -> float:
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"step": run}


def generation(model: Any, prompts: np.ndarray) -> dict[str, work.Step]:
    """Greedy replies with both of its caches."""
    ids = torch.tensor(prompts, dtype=torch.long)

    def run(n: int, cache: str) -> float:
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
        return float(out[:, ids.shape[1] :].sum())

    return {
        f"{part}, {cache} cache": lambda n=n, cache=cache: run(n, cache)
        for cache in ("static", "dynamic")
        for part, n in (("prefill", 1), ("whole", work.NEW))
    }


def preferences(folder: str, pairs: list[list[list[int]]]) -> dict[str, work.Step]:
    """TRL's DPOTrainer, with its live reference and with precomputed log-probs."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from trl_step import dpo_step, word_tokenizer

    def step(precomputed: bool) -> work.Step:
        run = dpo_step(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            word_tokenizer(work.VOCAB),
            pairs,
            output_dir=folder,
            per_device_train_batch_size=len(pairs),
            learning_rate=work.LEARNING_RATE,
            beta=work.BETA,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=precomputed,
        )
        return lambda: run(slice(None))

    return {"step, live reference": step(False), "step, precomputed": step(True)}


if __name__ == "__main__":
    work.take_turns(make, ("torch", "transformers", "trl"))
