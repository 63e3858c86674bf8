"""DPO steps compared with TRL's DPOTrainer: the same model, pairs, threads and dtype, in one run.

Counts the tokens that each side computes for a pair, then times single steps (forward, backward,
AdamW) in turns and prints pairs per second as ratios. TRL runs with its live reference, which is
its default, and with precomputed reference log-probs; gradient checkpointing, on by default there,
is off on both sides. Needs the extra `parity`.

    python benchmarks/preferences.py [--source=PAIRS.jsonl] [--max_length=512] [--rounds=3]

PAIRS.jsonl has the columns of UltraFeedback binarized. Without it, pairs are made with lengths
like those.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from packing import mistrals
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_step import dpo_step

import zephyr_jax as zj
from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.text.chat import render_pair
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.training.steps import loss_sums, train_step
from zephyr_jax.types import PreferenceBatch, Rows, TrainState

PAIRS_A_DEVICE = 8


class Pair(NamedTuple):
    """Token ids, cut to the limits."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def shared(self) -> int:
        """Tokens of the pair as one document."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected) + 1

    @property
    def longest(self) -> int:
        """Tokens of its longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="pairs, jsonl")
    parser.add_argument("--tokenizer", default=mistrals(), help="tokenizer.model")
    parser.add_argument("--max_length", type=int, default=512, help="of the timed pairs")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tok = zj.Tokenizer.from_file(args.tokenizer)
    say = sys.stdout.write
    say(tokens_per_pair(pairs_of(args.source, tok, 1024)) + "\n")
    pairs = pairs_of(args.source, tok, args.max_length)[: 2 * PAIRS_A_DEVICE]
    with tempfile.TemporaryDirectory() as folder:
        say(speed(pairs, tok, Path(folder), 2 * args.max_length, args.rounds) + "\n")


def pairs_of(source: Path | None, tok: zj.Tokenizer, max_length: int) -> list[Pair]:
    """Real pairs from a file, or made ones, cut as the recipes cut (prompts to half)."""

    def cut(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
        return Pair(*packing.cut_pair(prompt, chosen, rejected, max_length, max_length // 2, True))

    if source is None:
        rng = np.random.default_rng(0)
        sizes = np.exp(rng.normal((4.6, 5.3, 5.2), (1.0, 0.9, 0.9), (1000, 3))).astype(int) + 2
        made = ([list(map(int, rng.integers(3, 32000, n))) for n in size] for size in sizes)
        return [cut(*parts) for parts in made]
    pairs = []
    options = {"bos": True, "append_eos": False, "empty_system": False, "parse_special": False}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        answers = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        if answers[0].strip() != answers[1].strip():
            ids = render_pair(tok, row["chosen"][:-1], *answers, **options)
            pairs.append(cut(*ids))
    return pairs


def theirs_per_pair(pairs: list[Pair], n_orders: int = 20) -> float:
    """Tokens of a pair where 8 pairs are padded to their longest sequence, mean over orders."""
    longest, full = np.array([p.longest for p in pairs]), len(pairs) // 8 * 8
    totals = []
    for seed in range(n_orders):
        order = np.random.default_rng(seed).permutation(len(pairs))[:full].reshape(-1, 8)
        totals.append(16 * longest[order].max(axis=1).sum() / full)
    return float(np.mean(totals))


def ours_per_pair(pairs: list[Pair], shards: int, batch: int = 128, seq_len: int = 2048) -> float:
    """Tokens of a pair in packed rows, those of padding included, in a full batch."""
    lengths = [p.shared for p in pairs]
    batches = packing.level_batches(lengths, batch, 0, 0)
    most = max(len(packing.rows_of(lengths, indices, seq_len)) for indices in batches)
    return packing.round_up(most, shards) * seq_len / batch


def tokens_per_pair(pairs: list[Pair]) -> str:
    """The table of tokens computed for a pair."""
    theirs = theirs_per_pair(pairs)
    lines = [f"{len(pairs)} pairs of at most 1,024 tokens; TRL's collation: {theirs:.0f} a pair"]
    for shards in (1, 8, 16):
        ours = ours_per_pair(pairs, shards)
        lines.append(f"  packed, {shards:>2} row shards: {ours:.0f}, ratio {ours / theirs:.3f}")
    return "\n".join(lines)


def run_config() -> RunConfig:
    """The timed model: 32,000 tokens, width 256, four layers, 8 query and 2 key-value heads."""
    config = load_config("demo_dpo", ["--config.train.micro_batches=1", "--config.dpo.beta=0.1"])
    tree = config.to_dict()
    tree["model"] |= {
        "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "initializer_range": 0.02,
    }  # fmt: skip
    return RunConfig.from_config_dict(tree)


def ours(config: RunConfig, params: Any, pairs: list[Pair], seq_len: int) -> tuple[Callable, ...]:
    """A step over the next batch, and the pass of the reference over one."""
    batches, n_rows, per_row = [], 0, 0
    for start in range(0, len(pairs), PAIRS_A_DEVICE):
        part = pairs[start : start + PAIRS_A_DEVICE]
        documents = [packing.pair_document(*p, start + i + 1) for i, p in enumerate(part)]
        bins = packing.best_fit([p.shared for p in part], seq_len)
        batches.append((documents, bins))
        n_rows, per_row = max(n_rows, len(bins)), max(per_row, *map(len, bins))
    score = jax.jit(functools.partial(reference_logps, config.model, n_pairs=per_row))
    placed = []
    for documents, bins in batches:
        made = [
            packing.build_row([documents[i] for i in own], seq_len, per_row)
            for own in bins + [[]] * (n_rows - len(bins))
        ]
        rows = np.stack(made)
        batch = Rows(*map(jnp.asarray, packing.row_arrays(rows)))
        mask = jnp.asarray(rows["pair_ids"] != 0)
        placed.append(PreferenceBatch(batch, mask, score(params, batch)))
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1000))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params))
    step = jax.jit(train_step(loss_sums(config), optimizer, 1), donate_argnums=0)
    held = {"state": state}

    def run(i: int) -> None:
        held["state"], info = step(held["state"], placed[i % len(placed)])
        jax.block_until_ready(info)

    def reference(i: int) -> None:
        jax.block_until_ready(score(params, placed[i % len(placed)].rows))

    return run, reference


def theirs(folder: Path, pairs: list[Pair], work: Path, precomputed: bool) -> Callable[[int], None]:
    """A step of TRL's trainer over the next batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    step = dpo_step(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer,
        pairs,
        output_dir=str(work),
        per_device_train_batch_size=PAIRS_A_DEVICE,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precomputed,
    )

    def run(i: int) -> None:
        start = i * PAIRS_A_DEVICE % len(pairs)
        step(slice(start, start + PAIRS_A_DEVICE))

    return run


def speed(pairs: list[Pair], tok: zj.Tokenizer, work: Path, seq_len: int, rounds: int) -> str:
    """Ratios of pairs per second, steps taken in turns."""
    config = run_config()
    params = zj.init_params(config.model, jax.random.key(0))
    zj.export_hf(config.model, params, tok, work / "hf", dtype="float32")
    run, reference = ours(config, params, pairs, seq_len)
    sides = {
        "ours": run,
        "ours, reference pass": reference,
        "TRL, live reference": theirs(work / "hf", pairs, work / "a", False),
        "TRL, precomputed": theirs(work / "hf", pairs, work / "b", True),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):  # two rounds compile: for the first state and the step's own
        for name, side in sides.items():
            start = time.perf_counter()
            side(i)
            if i > 1:
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"{PAIRS_A_DEVICE} pairs a step, at most {seq_len // 2} tokens; seconds a step:"]
    lines += [f"  {name}: {value:.2f}" for name, value in middle.items()]
    both = middle["ours"] + middle["ours, reference pass"]
    for name in ("TRL, live reference", "TRL, precomputed"):
        lines.append(
            f"  against {name}: {middle[name] / middle['ours']:.2f} times the pairs a second; "
            f"{middle[name] / both:.2f} times with the reference's one pass counted"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
