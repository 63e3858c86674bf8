"""One side's training step of a 1B Mistral on a GPU: tokens a second and peak memory, as JSON.

Both sides: parameters, gradients and AdamW's moments in float32, products in bfloat16, everything
recomputed in the backward pass, rows of the same real tokens, DPO against a live reference. Ours
shares a pair's prompt; theirs is TRL's loss by DPOTrainer, with flash attention 2 if it is
installed, else SDPA.

    python benchmarks/gpu/step.py ours|theirs sft|dpo [--toy]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BIG = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 4096,
}  # fmt: skip
TOY = BIG | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128} | {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
Step = Callable[[], float]


def pairs_of(n: int, length: int, vocab: int) -> list[list[list[int]]]:
    """Pairs of a prompt of `length` / 2 tokens and two answers of `length` / 4."""
    rng = np.random.default_rng(0)
    parts = length // 2, length // 4, length // 4 - 1
    return [[rng.integers(3, vocab, part).tolist() for part in parts] for _ in range(n)]


def ours(kind: str, shape: dict[str, Any], rows: int, length: int) -> tuple[Step, dict[str, Any]]:
    """Our step, and what is known of its memory."""
    import jax
    import jax.numpy as jnp

    import zephyr_jax as zj
    from zephyr_jax.config.run import load_config
    from zephyr_jax.data.packing import packing
    from zephyr_jax.training.optim import make_optimizer
    from zephyr_jax.training.scores import reference_logps
    from zephyr_jax.training.sizes import estimated_gib
    from zephyr_jax.training.steps import initial_state, loss_sums, train_step
    from zephyr_jax.types import PreferenceBatch, Rows

    recipe = load_config(f"zephyr_7b_{kind}")
    cfg = zj.MistralConfig.from_hf({"model_type": "mistral", "rms_norm_eps": 1e-5} | shape)
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    train = dataclasses.replace(recipe.train, micro_batches=1, remat="full")
    data = dataclasses.replace(recipe.data, seq_len=length)
    mesh = dataclasses.replace(recipe.mesh, data=1, fsdp=1, tensor=1)
    config = dataclasses.replace(recipe, model=cfg, train=train, data=data, mesh=mesh)
    params = zj.init_params(cfg, jax.random.key(0))
    if kind == "sft":
        tokens = jnp.asarray(np.random.default_rng(0).integers(3, cfg.vocab_size, (rows, length)))
        ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(length), tokens.shape)
        batch: Any = Rows(tokens, ones, positions, jnp.zeros_like(tokens), ones > 0)
        score = None
    else:
        pairs = pairs_of(rows, length, cfg.vocab_size)
        documents = [packing.pair_document(p, c, r, i) for i, (p, c, r) in enumerate(pairs, 1)]
        packed_rows = np.stack([packing.build_row([d], length, 1) for d in documents])
        packed = Rows(*map(jnp.asarray, packing.row_arrays(packed_rows)))
        score = jax.jit(functools.partial(reference_logps, cfg, n_pairs=1))
        batch = PreferenceBatch(packed, jnp.ones((rows, 1), bool), score(params, packed))
    reference = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) if score else None
    optimizer = make_optimizer(config.optim, lambda _: 1e-5)
    step = jax.jit(train_step(loss_sums(config), optimizer, 1), donate_argnums=0)
    state = initial_state(config, optimizer, params)

    def run() -> float:
        nonlocal state, batch
        if score:
            batch = batch._replace(ref_logps=score(reference, batch.rows))
        state, info = step(state, batch)
        return float(info["loss"] / info["weight"])

    def memory() -> dict[str, Any]:
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", 0) / 2**30
        return {"peak_gib": round(peak, 2), "plan_gib": round(estimated_gib(config, rows), 2)}

    return run, {"memory": memory, "attention": train.attention}


def theirs(kind: str, shape: dict[str, Any], rows: int, length: int) -> tuple[Step, dict[str, Any]]:
    """The step of torch, or of TRL."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    flash = on_gpu and importlib.util.find_spec("flash_attn")
    attention = "flash_attention_2" if flash else "sdpa"
    config = transformers.MistralConfig(**shape, pad_token_id=0)
    torch.manual_seed(0)
    model: Any = transformers.MistralForCausalLM._from_config(config, attn_implementation=attention)
    if kind == "dpo":  # TRL reads its reference from where the model was read
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        model = transformers.MistralForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=torch.float32
        )
    model.to(device).gradient_checkpointing_enable()

    def memory() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        return {"peak_gib": round(peak, 2)}

    report = {"memory": memory, "attention": attention}
    if kind == "dpo":
        return _trl(model, pairs_of(rows, length, shape["vocab_size"]), shape["vocab_size"]), report
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    ids = torch.tensor(np.random.default_rng(0).integers(3, shape["vocab_size"], (rows, length)))
    ids = ids.to(device)

    def run() -> float:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run, report


def _trl(model: Any, pairs: list[list[list[int]]], vocab: int) -> Step:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from trl_step import dpo_step, word_tokenizer

    on_gpu = torch.cuda.is_available()
    step = dpo_step(
        model,
        word_tokenizer(vocab),
        pairs,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(pairs),
        learning_rate=1e-5,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=True,
    )
    return lambda: step(slice(None))


def main() -> None:
    """Times the step and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("kind", choices=("sft", "dpo"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    shape, rows, length = (TOY, 2, 128) if args.toy else (BIG, 8, 2048)
    step, report = (ours if args.side == "ours" else theirs)(args.kind, shape, rows, length)
    losses = [step() for _ in range(3)]  # compile, warm up
    seconds, until = [], time.perf_counter() + 45
    while len(seconds) < 20 and time.perf_counter() < until:
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds)
    line = {
        "side": args.side,
        "kind": args.kind,
        "step_s": round(took, 4),
        "tokens_per_s" if args.kind == "sft" else "pairs_per_s": round(
            rows * (length if args.kind == "sft" else 1) / took, 2
        ),
        "attention": report["attention"],
        **report["memory"](),
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
