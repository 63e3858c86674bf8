"""Conversion of raw dialogues: dialogues per CPU second, memory, and TFDS's own writer.

Makes raw shards of UltraChat's shape (6.3 kB of JSON a dialogue, every twentieth with sentences
that begin small), converts them with truecasing and filters on, and then lets TFDS's
ShardBasedBuilder write the same records in the same run. CPU seconds include child processes; peak
memory is of the largest process. Run by `python benchmarks/prepare.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from zephyr_jax.data.prepare.prepare import VERSION, prepare, report
from zephyr_jax.data.prepare.records import FEATURES, stored
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.dialogues import convert_raw

WORDS = 8_000


def write_raw(folder: Path, dialogues: int, shards: int, seed: int = 0) -> None:
    """Raw UltraChat files: 4 to 12 turns of sentences of synthetic words."""
    rng = np.random.default_rng(seed)
    alphabet = np.array(list("etaoinshrdlucmfwypvb"))
    words = ["".join(rng.choice(alphabet, n)) for n in rng.integers(2, 11, WORDS)]
    ranks = rng.zipf(1.3, 1_000_000) % WORDS
    at = 0
    for shard in range(shards):
        with (folder / f"train_{shard}.jsonl").open("w") as file:
            for number in range(shard, dialogues, shards):
                turns = []
                for turn in range(2 * int(rng.integers(2, 7))):
                    sentences = []
                    for _ in range(2 if turn % 2 == 0 else 15):
                        length = int(rng.integers(5, 16))
                        text = " ".join(words[i] for i in ranks[at : at + length])
                        at = (at + length) % (len(ranks) - 20)
                        sentences.append((text if number % 20 == 0 else text.capitalize()) + ".")
                    turns.append(" ".join(sentences))
                file.write(json.dumps({"id": str(number), "data": turns}) + "\n")


class PlainTfds(tfds.core.ShardBasedBuilder):
    """The baseline: the same cleaning, written by TFDS in its own way."""

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The raw files."

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=FEATURES["dialogue"])

    def _shard_iterators_per_split(self, dl_manager):
        def shard(path):
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    records, _ = convert_raw(json.loads(line), CleaningRules())
                    for record in records:
                        yield number, stored(record)

        paths = sorted(Path(dl_manager.manual_dir).glob("*.jsonl"))
        return {"train": [lambda path=path: shard(path) for path in paths]}


def cpu_seconds() -> float:
    """Of this process and of all children that have ended."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").mkdir()
        write_raw(folder / "raw", args.dialogues, args.shards)
        size = sum(path.stat().st_size for path in (folder / "raw").iterdir())
        rates = {}
        for who in ("zephyr_jax", "TFDS ShardBasedBuilder"):
            wall, cpu = time.perf_counter(), cpu_seconds()
            if who == "zephyr_jax":
                path = prepare("ultrachat", folder / "raw", folder / "ours", workers=args.workers)
                kept = sum(report(path)["rows"]["kept"].values())
            else:
                builder = PlainTfds(data_dir=folder / "theirs")
                config = tfds.download.DownloadConfig(manual_dir=folder / "raw")
                builder.download_and_prepare(download_config=config, file_format="array_record")
                kept = builder.info.splits["train"].num_examples
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            rates[who] = args.dialogues / cpu
            sys.stdout.write(
                f"{who:<24}{rates[who]:8.0f} dialogues/CPU s{args.dialogues / wall:8.0f} /s"
                f"{kept:>9,} kept\n"
            )
        peaks = [
            resource.getrusage(kind).ru_maxrss / 1024
            for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
    ours, theirs = rates.values()
    sys.stdout.write(
        f"1,468,348 raw dialogues of UltraChat: {1_468_348 / ours / 60:.1f} CPU minutes\n"
        f"{size / args.dialogues:.0f} bytes a dialogue, {args.workers} workers; ratio "
        f"{ours / theirs:.2f}; peak memory {max(peaks):.0f} MB\n"
    )


if __name__ == "__main__":
    main()
