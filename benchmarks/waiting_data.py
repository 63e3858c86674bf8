"""Full sets from raw rows to packed rows: CPU time and memory against the number of rows.

For each size makes raw dialogues of UltraChat's shape (6.2 kB and 1,230 tokens each, of words of
Mistral's vocabulary, every twentieth with sentences that begin small), converts them with
truecasing and filters on, and packs the training split with Mistral's tokenizer, each in a process
of its own. Memory is that of the largest process; CPU seconds include the workers.

    python benchmarks/waiting_data.py 10000 30000 100000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
from packing import mistrals

from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.text.tokenizer import Tokenizer

RAW, PUBLISHED = 1_468_348, 207_865  # dialogues of UltraChat, and of its published training split


def write_raw(folder: Path, dialogues: int, shards: int = 4) -> None:
    """Raw UltraChat files: 4 to 12 turns, short questions and answers of 15 sentences."""
    rng = random.Random(0)
    vocabulary = sentencepiece.SentencePieceProcessor(mistrals())
    pieces = map(vocabulary.id_to_piece, range(vocabulary.vocab_size()))
    words = [
        piece[1:]
        for piece in pieces
        if len(piece) > 3 and piece[0] == "\u2581" and piece[1:].islower()
    ]
    total = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    lengths = (rng.randrange(8, 26) for _ in range(20_000))
    texts = (rng.choices(words, cum_weights=total, k=length) for length in lengths)
    sentences = [f"{' '.join(text)}." for text in texts]
    for shard in range(shards):
        with (folder / f"train_{shard}.jsonl").open("w") as file:
            for number in range(shard, dialogues, shards):
                turns = []
                for turn in range(2 * rng.randrange(2, 7)):
                    some = rng.choices(sentences, k=15 if turn % 2 else 2)
                    some = some if number % 20 == 0 else map(str.capitalize, some)
                    turns.append(" ".join(some))
                turns[0] += f" {number}"
                file.write(json.dumps({"id": str(number), "data": turns}) + "\n")


def prepare_stage(folder: Path) -> None:
    """Raw rows to a TFDS set."""
    prepare("ultrachat", folder / "raw", folder / "sets")


def pack_stage(folder: Path) -> None:
    """The set to packed rows of 2,048 tokens."""
    changes = [f"--config.data.data_dir={folder / 'sets'}", "--config.data.dataset=ultrachat/raw"]
    config = load_config("zephyr_7b_sft", [*changes, "--config.data.splits=('train_sft', '')"])
    build_packed(config, Tokenizer.from_file(Path(mistrals())))


STAGES = {"prepare": prepare_stage, "pack": pack_stage}


def run_stage(stage: str, folder: Path) -> None:
    """Runs a stage in this process and prints its cost as JSON."""
    start = time.perf_counter()
    STAGES[stage](folder)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cost = {
        "cpu": sum(one.ru_utime + one.ru_stime for one in usage),
        "wall": time.perf_counter() - start,
        "mb": max(one.ru_maxrss for one in usage) / 1024,
    }
    sys.stdout.write(json.dumps(cost) + "\n")


def measured(stage: str, folder: Path) -> dict[str, float]:
    """The cost of a stage in a new process."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Prints a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--scratch", help="folder for the files; 20 kB a dialogue")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage, args.folder)
        return
    rates = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as name:
            (Path(name) / "raw").mkdir()
            write_raw(Path(name) / "raw", size)
            costs = {stage: measured(stage, Path(name)) for stage in STAGES}
        cells = [f"{size:,}"]
        for stage, cost in costs.items():
            rates[stage] = cost["cpu"] / size
            cells.append(f"{cost['cpu']:.0f} s, {rates[stage] * 1e6:.0f} us a dialogue")
            cells.append(f"{cost['mb']:.0f} MB")
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()
    sys.stdout.write(
        f"{RAW:,} raw dialogues, prepared: {RAW * rates['prepare'] / 60:.1f} CPU-minutes; "
        f"{PUBLISHED:,}, packed: {PUBLISHED * rates['pack'] / 60:.1f}\n"
    )


if __name__ == "__main__":
    main()
