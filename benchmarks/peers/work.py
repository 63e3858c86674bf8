"""The work that is raced: shapes, weights and data, and the loop of a side that takes its turns.

Every side runs in a process and an environment of its own, so this file needs nothing but NumPy.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VOCAB, LAYERS, EPS = 32_000, 4, 1e-5
THETA = 1e6  # of rotary positions; tunix's Llama has no other
LEARNING_RATE, BETA = 2e-5, 0.1  # AdamW of betas 0.9 and 0.999, clipped at 1; DPO's beta
PROMPT, NEW = 64, 128  # tokens of a greedy reply


class Shape(NamedTuple):
    """A Mistral of four layers and 32,000 tokens, and how much it is given to do."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rows: int = 4  # of `length` tokens, all of them targets
    length: int = 512
    pairs: int = 4  # a prompt and two answers of `answer` tokens each
    answer: int = 256


SHAPES = {
    "tiny": Shape(256, 8, 2, 32, 896),
    "d512": Shape(512, 8, 2, 64, 1792),
    "d1024": Shape(1024, 16, 4, 64, 3584, rows=2, pairs=2),
    "toy": Shape(64, 4, 2, 16, 128, rows=1, length=64, pairs=1, answer=32),  # does it run?
}
KINDS = ("sft", "dpo", "dpo-real", "generate-4", "generate-32")
Step = Callable[[], float]  # one unit of work; returns its loss, or a checksum of the new tokens


def hf_config(shape: Shape) -> dict[str, Any]:
    """The fields of transformers' MistralConfig."""
    return {
        "vocab_size": VOCAB, "hidden_size": shape.width, "intermediate_size": shape.ffn,
        "num_hidden_layers": LAYERS, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "rope_theta": THETA,
        "max_position_embeddings": 1024, "sliding_window": None, "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
    }  # fmt: skip


def make_weights(shape: Shape, spread: float) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, normal with this standard deviation."""
    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32) * np.float32(spread)

    d, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {"model.embed_tokens.weight": normal(VOCAB, d)}
    for i in range(LAYERS):
        sizes = {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (shape.ffn, d),
            "mlp.up_proj": (shape.ffn, d), "mlp.down_proj": (d, shape.ffn),
        }  # fmt: skip
        for name, size in sizes.items():
            weights[f"model.layers.{i}.{name}.weight"] = normal(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = np.ones(d, np.float32)
    weights["model.norm.weight"] = np.ones(d, np.float32)
    weights["lm_head.weight"] = normal(VOCAB, d)
    return weights


def make_data(shape: Shape, kind: str) -> dict[str, np.ndarray]:
    """The tokens of a kind of work; lengths are those of each pair's prompt and answers."""
    rng = np.random.default_rng(1)

    def ids(*size: int) -> np.ndarray:
        return rng.integers(3, VOCAB, size, dtype=np.int32)

    if kind == "sft":
        return {"tokens": ids(shape.rows, shape.length)}
    if kind.startswith("generate"):
        return {"prompts": ids(int(kind.split("-")[1]), PROMPT)}
    n, most = shape.pairs, shape.answer
    lengths = np.full((n, 3), most)
    if kind == "dpo-real":  # logarithms normal, with UltraFeedback's medians at half their lengths
        lengths = np.exp(rng.normal((4.0, 4.6, 4.5), (0.9, 0.9, 0.9), (n, 3)))
        lengths = np.clip(lengths.astype(int), 4, most)
    sides = {name: ids(n, most) for name in ("prompt", "chosen", "rejected")}
    return sides | {"lengths": lengths}


def targets_of(kind: str, data: dict[str, np.ndarray]) -> int:
    """Tokens that carry loss; of a reply those that are new."""
    if kind == "sft":
        return data["tokens"].shape[0] * (data["tokens"].shape[1] - 1)
    if kind.startswith("dpo"):
        return int(data["lengths"][:, 1:].sum())
    return len(data["prompts"]) * NEW


def pairs_of(data: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """Prompt, chosen and rejected answer of every pair."""
    sides = [data[name] for name in ("prompt", "chosen", "rejected")]
    return [
        [side[i, :size].tolist() for side, size in zip(sides, sizes, strict=True)]
        for i, sizes in enumerate(data["lengths"])
    ]


def take_turns(
    make: Callable[[str, Shape, dict[str, np.ndarray], dict[str, np.ndarray]], dict[str, Step]],
    packages: tuple[str, ...],
) -> None:
    """Runs `make(kind, shape, weights, data)`'s parts once for each line of standard input.

    Every answer is a line of JSON: seconds of the process's CPU, seconds by the clock and the
    loss of each part. The first turn compiles.
    """
    answers = os.fdopen(os.dup(1), "w")  # whatever else is printed goes to standard error
    os.dup2(2, 1)
    kind, name, folder = sys.argv[1:]
    weights, data = (dict(np.load(Path(folder) / f"{x}.npz")) for x in ("weights", "data"))
    parts = make(kind, SHAPES[name], weights, data)
    versions = {package: importlib.metadata.version(package) for package in packages}
    answers.write(json.dumps(versions) + "\n")
    answers.flush()
    for _ in sys.stdin:
        turn = {}
        for part, step in parts.items():
            start = time.process_time(), time.perf_counter()
            loss = step()
            end = time.process_time(), time.perf_counter()
            turn[part] = [end[0] - start[0], end[1] - start[1], loss]
        answers.write(json.dumps(turn) + "\n")
        answers.flush()
