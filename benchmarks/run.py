"""Training speed compared with transformers + torch: the same model, batch and optimizer, in turns.

Prints tokens that carry loss per second of both, and their ratio; absolute numbers mean nothing on
a shared machine. Run by `make bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import loss_sums, train_step
from zephyr_jax.types import Rows, TrainState

CONFIG = zj.MistralConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=None,
    dtype="float32",
)


def ours(tokens: np.ndarray) -> Callable[[], None]:
    """One AdamW step of ours on rows `B T`, every token a target."""
    config = dataclasses.replace(load_config("zephyr_7b_sft"), model=CONFIG)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1000))
    params = zj.init_params(CONFIG, jax.random.key(0))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = jax.jit(train_step(loss_sums(config), optimizer, 1), donate_argnums=0)
    ones, zeros = jnp.ones(tokens.shape, jnp.int32), jnp.zeros(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rows = Rows(jnp.asarray(tokens, jnp.int32), ones, positions, zeros, ones > 0)
    holder = [state]

    def run() -> None:
        holder[0], _ = step(holder[0], rows)
        jax.block_until_ready(holder[0])

    return run


def theirs(tokens: np.ndarray) -> Callable[[], None]:
    """One AdamW step of transformers' MistralForCausalLM (sdpa) with torch."""
    config = transformers.MistralConfig(
        **{k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "dtype"}
    )
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    ids = torch.tensor(tokens)

    def run() -> None:
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    """Measures both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokens = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (args.rows, args.seq_len))
    runs = {"zephyr_jax": ours(tokens), "transformers + torch": theirs(tokens)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    targets = args.rows * (args.seq_len - 1)
    rates = {name: targets / statistics.median(took[1:]) for name, took in seconds.items()}
    for name, rate in rates.items():
        sys.stdout.write(f"{name:<22} {rate:8.0f} target tokens/s\n")
    ours_rate, theirs_rate = rates.values()
    sys.stdout.write(f"ratio                  {ours_rate / theirs_rate:8.2f}\n")


if __name__ == "__main__":
    main()
