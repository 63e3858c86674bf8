"""Greedy decoding against transformers' `generate`: the same weights and prompts, in turns.

Prints the new tokens per second of each (prefill included), medians, and how many times as fast
ours is; absolute numbers mean nothing on a shared machine. Run by `python benchmarks/decode.py`,
on one core by `taskset -c 0 python ...`, which spares torch the fights over a busy second one.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

import zephyr_jax as zj
from zephyr_jax.inference.decoding import cast_params, decode
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.types import Params
from zephyr_jax.weights.huggingface import hf_layout

CONFIG = zj.MistralConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    sliding_window=None,
    initializer_range=0.1,
    dtype="float32",
)
Run = Callable[[np.ndarray, int], np.ndarray]  # prompts `B T`, n -> new tokens `B n`


def ours(params: Params) -> Run:
    """Our greedy decoding, with no stop token."""

    def run(prompts: np.ndarray, n: int) -> np.ndarray:
        weights = cast_params(CONFIG, params)  # as every call of `generate` does
        chunks = decode(CONFIG, weights, prompts.tolist(), SamplingParams(max_new_tokens=n))
        return np.concatenate([tokens for tokens, _ in chunks], axis=1)

    return run


def theirs(params: Params, cache: str) -> Run:
    """`generate` of transformers' MistralForCausalLM (sdpa) with one of its caches."""
    fields = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "dtype"}
    config = transformers.MistralConfig(**fields, pad_token_id=0)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in hf_layout(CONFIG).write(params, "float32")}
    )
    model.eval()

    def run(prompts: np.ndarray, n: int) -> np.ndarray:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
        return out[:, ids.shape[1] :].numpy()

    return run


def measure(runs: dict[str, Run], batch: int, prompt: int, new: int, rounds: int) -> None:
    """Times all in turns, `rounds` times after one to warm up, and prints medians."""
    prompts = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (batch, prompt))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, np.ndarray] = {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name] = run(prompts, new)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(took[1:]) for name, took in seconds.items()}
    own, *others = runs
    sys.stdout.write(f"batch {batch}, {prompt} tokens of prompt, {new} new\n")
    sys.stdout.write(f"  {own:<22} {batch * new / medians[own]:8.1f} tokens/s\n")
    for name in others:
        same = int(np.cumprod(tokens[name] == tokens[own], axis=1).sum())
        sys.stdout.write(
            f"  {name:<22} {batch * new / medians[name]:8.1f} tokens/s   ratio "
            f"{medians[name] / medians[own]:5.2f}   {same} of {batch * new} tokens are the same\n"
        )


def main() -> None:
    """Measures each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"])
    args = parser.parse_args()
    params = zj.init_params(CONFIG, jax.random.key(0))
    runs = {"zephyr_jax": ours(params)}
    runs |= {f"transformers, {cache}": theirs(params, cache) for cache in args.caches}
    for batch in args.batches:
        measure(runs, batch, args.prompt, args.new, args.rounds)


if __name__ == "__main__":
    main()
