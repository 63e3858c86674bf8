"""Numbers over many records or rows: lengths, margins, fill. Pure, but for what they read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.inspect.tokens import chat_ids, pair_ids

ALL_UP_TO = 200_000  # records that statistics read whole
SAMPLE = 2000
LIMITS = (512, 1024, 2048, 4096, 8192)
_BINS = 12
_BATCH = 256


class Bin(NamedTuple):
    """Values from `low` to below `high`; None: no end on that side."""

    low: float | None
    high: float | None
    size: int


class Sampled(NamedTuple):
    """Which of all records the numbers are from, in order, and how many there are in all."""

    indices: Sequence[int]
    total: int

    @property
    def said(self) -> str:
        """In words, for a caption."""
        if len(self.indices) == self.total:
            return f"all {self.total:,}"
        return f"{len(self.indices):,} of {self.total:,}, drawn with seed 0"


def sampled(total: int, wanted: int, everything: int) -> Sampled:
    """All indices, or `wanted` drawn by a fixed seed where there are too many.

    Args:
      total: how many there are.
      wanted: the size of a sample; 0: `SAMPLE`, and only beyond `ALL_UP_TO`.
      everything: how many there are with those that the same page is about too.
    """
    if total <= (wanted or SAMPLE) or (not wanted and everything <= ALL_UP_TO):
        return Sampled(range(total), total)
    drawn = np.random.default_rng(0).choice(total, wanted or SAMPLE, replace=False)
    return Sampled(sorted(map(int, drawn)), total)


def histogram(values: Sequence[float], bins: int = _BINS) -> list[Bin]:
    """Counts in bins with round edges; what is far out falls into an open bin at that end.

    >>> [bin.size for bin in histogram([1, 1, 2, 5], bins=5)]
    [0, 2, 1, 0, 0, 1]
    """
    if not len(values):
        return []
    array = np.asarray(values, float)
    low, high = (float(x) for x in np.quantile(array, (0.005, 0.995)))
    if float(array.min()) >= 0 and low < (high - low) / 2:
        low = 0.0
    step = _round_step((high - low) / bins, bool((array == array.round()).all()))
    first = math.floor(low / step)
    # An edge must stand above what is not far out.
    last = max(math.floor(high / step) + 1, first + 1)
    edges = [step * i for i in range(first, last + 1)]
    counts = np.bincount(np.searchsorted(edges, array, side="right"), minlength=len(edges) + 1)
    inner = zip(edges, edges[1:], counts[1:-1], strict=False)
    found = [Bin(None, edges[0], int(counts[0]))] if counts[0] else []
    found += [Bin(a, b, int(n)) for a, b, n in inner]
    return found + ([Bin(edges[-1], None, int(counts[-1]))] if counts[-1] else [])


def _round_step(width: float, whole: bool) -> float:
    """1, 2 or 5 times a power of ten, not below the width; for whole numbers at least 1."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= width * 0.999)
    return max(step, 1.0) if whole else step


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and greatest value; empty for no values."""
    if not len(values):
        return {}
    array = np.asarray(values, float)
    return {
        "least": float(array.min()),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "95%": float(np.quantile(array, 0.95)),
        "greatest": float(array.max()),
    }


def record_numbers(records: Iterable[Row], tok: Tokenizer | None) -> dict[str, list[float]]:
    """Lengths of records, in tokens or else characters, and of pairs the margins of the scores.

    `length` is of a whole dialogue, of a pair's prompt with its longer answer; pairs also have
    `prompt`, `chosen`, `rejected` and `margin` (chosen minus rejected).
    """
    numbers: dict[str, list[float]] = {}
    for record in records:
        for name, value in _numbers_of(record, tok).items():
            numbers.setdefault(name, []).append(value)
    return numbers


def _numbers_of(record: Row, tok: Tokenizer | None) -> dict[str, float]:
    if "messages" in record:
        if tok is not None:
            return {"length": len(chat_ids(tok, record["messages"]))}
        return {"length": _characters(record["messages"])}
    if tok is not None:
        prompt, chosen, rejected = map(len, pair_ids(tok, record))
    else:
        prompt = _characters(record["chosen"][:-1])
        chosen, rejected = (_characters(record[side][-1:]) for side in ("chosen", "rejected"))
    return {
        "length": prompt + max(chosen, rejected),
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": record["score_chosen"] - record["score_rejected"],
    }


def _characters(messages: Sequence[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def packed_numbers(packed: PackedSet, split: str, chosen: Sequence[int]) -> dict[str, list[float]]:
    """Of these rows of a packed split: `fill` (shares), and of their documents lengths and targets.

    Returns:
      `fill`: share of a row's places that hold tokens; `documents`: how many a row holds;
      `length`: tokens of each document; `targets`: those that carry loss.
    """
    source = packed.rows(split)
    numbers: dict[str, list[float]] = {"fill": [], "documents": [], "length": [], "targets": []}
    for at in range(0, len(chosen), _BATCH):
        for row in source.read(chosen[at : at + _BATCH]):
            segments = row["segments"]
            lengths = np.bincount(segments)[1:]
            targets = np.bincount(segments, row["loss_mask"])[1:]
            numbers["fill"].append(float((segments > 0).mean()))
            numbers["documents"].append(len(lengths))
            numbers["length"] += lengths.tolist()
            numbers["targets"] += targets.tolist()
    return numbers
