"""Decontamination and near-duplicate detection: records per CPU second, at N, 2N and 4N records.

The texts are drawn from a seeded list of words whose frequencies fall as in prose: dialogues of
about 1,000 words, prompts of about 60, of which one in eight nearly repeats another. The list of
benchmark prompts has the sizes of MT-Bench, AlpacaEval and HumanEval (160 turns, 805, 164). Run by
`python benchmarks/filters.py [--n=2000]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from zephyr_jax.data.raw.filters import (
    Contaminants,
    contamination,
    load_contaminants,
    near_duplicates,
    signature,
)

VOCABULARY = 30_000
COMMON = ("the", "of", "and", "to", "a", "in", "is", "that", "for", "it")


class Texts:
    """Random texts whose words fall in frequency as in prose (Zipf)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        letters = np.array(list("etaoinshrdlu"))
        sizes = self.rng.integers(4, 10, VOCABULARY - len(COMMON))
        self.words = [*COMMON, *("".join(self.rng.choice(letters, size)) for size in sizes)]
        shares = 1 / np.arange(1, VOCABULARY + 1)
        self.limits = np.cumsum(shares / shares.sum())

    def text(self, length: int, stop: str = ". ") -> str:
        """A text of so many words with a stop every 12 words."""
        drawn = np.minimum(np.searchsorted(self.limits, self.rng.random(length)), VOCABULARY - 1)
        picked = [self.words[index] for index in drawn]
        return stop.join(" ".join(picked[at : at + 12]) for at in range(0, length, 12))

    def dialogue(self, stop: str) -> dict[str, list[dict[str, str]]]:
        """A record of six messages, 1,000 words in all."""
        roles = ("user", "assistant") * 3
        sizes = (60, 300, 40, 290, 40, 270)
        turns = [
            {"role": role, "content": self.text(size, stop)}
            for role, size in zip(roles, sizes, strict=True)
        ]
        return {"messages": turns}


def contaminants(texts: Texts, folder: Path) -> Contaminants:
    """Prompts in the sizes of the three usual benchmarks."""
    shapes = (("turns", 80, 2, 60), ("instruction", 805, 1, 30), ("prompt", 164, 1, 70))
    paths = []
    for key, rows, turns, size in shapes:
        paths.append(folder / f"{key}.jsonl")
        with paths[-1].open("w") as file:
            for _ in range(rows):
                prompts = [texts.text(int(texts.rng.integers(4, 2 * size))) for _ in range(turns)]
                row = {key: prompts if key == "turns" else prompts[0]}
                file.write(json.dumps(row) + "\n")
    return load_contaminants(paths)


def prompts(texts: Texts, count: int) -> list[str]:
    """Prompts of about 60 words; one in eight repeats an earlier one but for its last word."""
    made: list[str] = []
    for index in range(count):
        if index % 8 == 7:
            model = made[int(texts.rng.integers(len(made)))]
            made.append(model.rsplit(" ", 1)[0] + " " + texts.words[index % VOCABULARY])
        else:
            made.append(texts.text(int(texts.rng.integers(30, 90))))
    return made


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000, help="the smallest number of records")
    smallest = parser.parse_args().n
    texts = Texts(0)
    with tempfile.TemporaryDirectory() as folder:
        banned = contaminants(texts, Path(folder))
    contamination(texts.dialogue(". "), banned)  # makes the index
    for name, stop in (("plain ASCII", ". "), ("with a typographic mark", " — ")):
        made = [texts.dialogue(stop) for _ in range(500)]
        for count in (smallest, 2 * smallest, 4 * smallest):
            start = time.process_time()
            dropped = sum(bool(contamination(made[index % 500], banned)) for index in range(count))
            seconds = time.process_time() - start
            sys.stdout.write(
                f"contamination, {name}: {count} dialogues, {count / seconds:,.0f} a CPU second, "
                f"{dropped} dropped\n"
            )
    for count in (8 * smallest, 16 * smallest, 32 * smallest):
        made = prompts(texts, count)
        start = time.process_time()
        signatures = [signature(prompt) for prompt in made]
        middle = time.process_time()
        found = near_duplicates(signatures)
        end = time.process_time()
        sys.stdout.write(
            f"signature: {count} prompts, {count / (middle - start):,.0f} a CPU second; "
            f"near_duplicates: {count / (end - middle):,.0f} a CPU second, "
            f"{np.count_nonzero(found >= 0)} found\n"
        )


if __name__ == "__main__":
    main()
