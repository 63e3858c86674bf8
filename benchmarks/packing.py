"""Speed and memory of packing, and how much padding each way of filling rows leaves.

Prepares and packs raw dialogues or pairs in a process of its own and prints tokens per CPU second
(of it and its workers), its peak memory, and a table of padding at T tokens a row. On a shared
machine CPU seconds move by a quarter from run to run.

    python benchmarks/packing.py [--tokenizer=tokenizer.model] [--source=FILE.jsonl]

Without --source, dialogues are made whose lengths are like UltraChat's: about 1,200 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.packing import documents, packed, packing
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.data.text.tokenizer import Tokenizer

_PARTS = ["ka", "lo", "mi", "ne", "tu", "ra", "si", "po", "ing", "er", "tion", "al", "un", "the"]


def mistrals() -> str:
    """Mistral-7B's tokenizer, where the test extra has brought it."""
    found = importlib.util.find_spec("mistral_common")
    folders = found.submodule_search_locations if found else None
    return str(Path(folders[0]) / "data" / "tokenizer.model.v1") if folders else ""


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default=mistrals(), help="tokenizer.model, or a folder")
    parser.add_argument("--source", type=Path, help="raw dialogues or pairs, jsonl")
    parser.add_argument("--dialogues", type=int, default=20_000, help="to make without --source")
    parser.add_argument("--seq_len", type=int, default=2048)
    args = parser.parse_args()
    path = Path(args.tokenizer)
    tok = Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or make_dialogues(Path(folder) / "made.jsonl", args.dialogues)
        config = prepared(source, Path(folder), args.seq_len)
        say = sys.stdout.write
        say(f"{args.source or f'{args.dialogues} made dialogues'}, T={args.seq_len}\n")
        say(speed(config, tok) + "\n" + padding(config, tok) + "\n")


def make_dialogues(path: Path, n: int) -> Path:
    """Writes n dialogues of made words; one in six is longer than 2,048 tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choices(_PARTS, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(9000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with path.open("w") as file:
        for number in range(n):
            pool = iter(rng.choices(words, weights, k=4000))
            turns = []
            for _ in range(rng.choice((1, 2, 3, 3, 4, 4))):
                for mean in (25, 150):
                    size = max(3, int(rng.lognormvariate(0, 0.6) * mean))
                    said = [next(pool, "end") for _ in range(size)]
                    turns.append(" ".join(said).capitalize() + ".")
            turns[0] += f" {number}"
            file.write(json.dumps({"id": str(number), "data": turns}) + "\n")
    return path


def prepared(source: Path, folder: Path, seq_len: int) -> RunConfig:
    """A run on the prepared source, dialogues or pairs as its first row says."""
    with source.open() as file:
        first = json.loads(file.readline())
    pairs = "chosen" in first or "completions" in first
    name = "ultrafeedback" if pairs else "ultrachat"
    variant = "binarized" if "chosen" in first else "200k" if "messages" in first else "raw"
    prepare(name, source, folder, variant)
    config = load_config("zephyr_7b_dpo" if pairs else "zephyr_7b_sft")
    data = dataclasses.replace(
        config.data,
        data_dir=str(folder),
        dataset=f"{name}/{variant}",
        seq_len=seq_len,
    )
    return dataclasses.replace(config, data=data)


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def speed(config: RunConfig, tok: Tokenizer) -> str:
    """Packs once; tokens in per CPU second, and peak memory of the largest process."""
    member = documents.members(config.data)[0]
    n = len(read_split(member.folder, config.data.splits[0]))  # imports TFDS beforehand
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), cpu_seconds()
    made = packed.build_packed(config, tok)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    splits, pairs = made.manifest["splits"].values(), made.manifest["pairs_per_row"]
    tokens = sum(info["tokens"] + info.get("tokens_cut", 0) for info in splits)
    peaks = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    size = sum(info["bytes"] for info in made.manifest["files"].values())
    return (
        f"{n:,} {'pairs' if pairs else 'dialogues'} to train on, {tokens:,} tokens read, "
        f"{os.cpu_count()} cores: {cpu:.1f} CPU s, "
        f"{wall:.1f} s; "
        f"{tokens / cpu / 1e3:.0f}k tokens per CPU second, {tokens / wall / 1e3:.0f}k per second\n"
        f"peak memory {peaks[0]:.0f} MiB (before packing {base / 1024:.0f}), largest worker "
        f"{peaks[1]:.0f} MiB; {size / tokens:.2f} bytes a token on disk"
    )


def padding(config: RunConfig, tok: Tokenizer) -> str:
    """A table: share of padding, of tokens lost, and rows, for each way of filling rows."""
    chat, seq_len = config.chat, config.data.seq_len
    member = documents.members(config.data)[0]
    split = read_split(member.folder, config.data.splits[0])
    rendering = documents.Rendering(chat, False, None)
    if dpo := config.dpo:
        rendering = documents.Rendering(chat, True, dpo.max_length, dpo.max_prompt_length)
    records = (split[i] for i in range(min(len(split), 4000)))
    rendered = (documents.document_of(tok, rendering, record, "") for record in records)
    lengths = [len(document.tokens) for document in rendered]
    cut = [min(length, seq_len) for length in lengths]
    ways = {
        "one document a row": (len(cut), sum(cut)),
        "first fit, in order": (first_fit(cut, seq_len), sum(cut)),
        "best fit (ours)": (len(packing.best_fit(cut, seq_len)), sum(cut)),
    }
    if not config.dpo:
        rows = len(packing.cut_stream(lengths, seq_len, 0)[0])
        ways["concat"] = (rows, rows * seq_len)
    lines = [
        f"{len(lengths)} documents, {np.mean(lengths):.0f} tokens on average, "
        f"{np.mean(np.asarray(lengths) > seq_len):.1%} longer than a row",
        "| rows filled by | rows | padding | tokens lost |",
        "|---|---|---|---|",
    ]
    for name, (rows, kept) in ways.items():
        lost = 1 - kept / sum(lengths)
        lines.append(f"| {name} | {rows} | {1 - kept / (rows * seq_len):.2%} | {lost:.2%} |")
    return "\n".join(lines)


def first_fit(lengths: list[int], capacity: int) -> int:
    """How many rows documents need that each go into the first row with room, as they come."""
    rooms, used = np.full(len(lengths), capacity, np.int64), 0
    for length in lengths:
        at = int(np.argmax(rooms >= length))  # a row that is empty yet always fits
        rooms[at] -= length
        used = max(used, at + 1)
    return used


if __name__ == "__main__":
    main()
