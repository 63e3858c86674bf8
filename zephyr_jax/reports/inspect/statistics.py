"""Numbers over many records or rows for a page: lengths, score margins, how full rows are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.html import Page, percent
from zephyr_jax.reports.inspect.documents import OPTIONS, pair_ids
from zephyr_jax.reports.plots import Histogram

ALL_UP_TO = 200_000  # records that statistics read whole
SAMPLE = 2000
_LIMITS = (512, 1024, 2048, 4096, 8192)
_BATCH = 256


class Sampled(NamedTuple):
    """Which of all records the numbers are from, in order, and how many there are in all."""

    indices: Sequence[int]
    total: int

    @property
    def caption(self) -> str:
        """In words."""
        if len(self.indices) == self.total:
            return f"all {self.total:,}"
        return f"{len(self.indices):,} of {self.total:,}, drawn with seed 0"


def sampled(total: int, requested: int, everything: int) -> Sampled:
    """All indices, or `requested` drawn by a fixed seed where there are too many.

    Args:
      total: how many there are.
      requested: the size of a sample; 0: `SAMPLE`, and only beyond `ALL_UP_TO`.
      everything: how many there are with those that the same page is about too.
    """
    size = requested or SAMPLE
    if total <= size or (not requested and everything <= ALL_UP_TO):
        return Sampled(range(total), total)
    drawn = np.random.default_rng(0).choice(total, size, replace=False)
    return Sampled(sorted(map(int, drawn)), total)


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
        messages = record["messages"]
        if tok is None:
            return {"length": _characters(messages)}
        return {"length": len(render_chat(tok, messages, **OPTIONS)[0])}
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


def packed_numbers(packed: PackedSet, split: str, indices: Sequence[int]) -> dict[str, list[float]]:
    """Numbers of some rows of a packed split and of their documents.

    Returns:
      `fill`: share of a row's positions that hold tokens; `documents`: how many a row holds;
      `length`: tokens of each document; `targets`: its target tokens.
    """
    source = packed.rows(split)
    numbers: dict[str, list[float]] = {"fill": [], "documents": [], "length": [], "targets": []}
    for at in range(0, len(indices), _BATCH):
        for row in source.read(indices[at : at + _BATCH]):
            lengths = np.bincount(row["segments"])[1:]
            numbers["fill"].append(float((row["segments"] > 0).mean()))
            numbers["documents"].append(len(lengths))
            numbers["length"] += lengths.tolist()
            numbers["targets"] += np.bincount(row["segments"], row["loss_mask"])[1:].tolist()
    return numbers


def add_record_numbers(page: Page, numbers: Mapping[str, Sequence[float]], unit: str) -> None:
    """Adds histograms of what `record_numbers` returned, lengths in `unit`."""
    titles = {
        "length": f"Length in {unit}",
        "prompt": f"Prompt, {unit}",
        "chosen": f"Chosen answer, {unit}",
        "rejected": f"Rejected answer, {unit}",
        "margin": "Score margin, chosen minus rejected",
    }
    _add_histograms(page, numbers, titles, "records")
    lengths = numbers.get("length", ())
    if unit == "tokens" and lengths:
        over = [(limit, sum(length > limit for length in lengths)) for limit in _LIMITS]
        rows = [[f"{limit:,} tokens", f"{n:,}", percent(n / len(lengths))] for limit, n in over]
        page.table(["longer than", "records", "share"], rows, 1, "What rows of a length would cut")


def add_packed_numbers(page: Page, numbers: Mapping[str, Sequence[float]]) -> None:
    """Adds histograms of what `packed_numbers` returned."""
    titles = {
        "fill": "Fill of the rows, share of positions",
        "documents": "Documents in a row",
        "length": "Length of a document, tokens",
        "targets": "Target tokens of a document",
    }
    _add_histograms(page, numbers, titles, "count")


def _add_histograms(
    page: Page, numbers: Mapping[str, Sequence[float]], titles: dict[str, str], ylabel: str
) -> None:
    plots = []
    for name, title in titles.items():
        values = np.asarray(numbers.get(name, ()), float)
        if len(values):
            note = f"Median {np.median(values):.4g}, 95% up to {np.quantile(values, 0.95):.4g}."
            label = name if name in ("chosen", "rejected") else "value"
            plots.append(Histogram(title, "", ylabel, {label: values}, note))
    page.figures(plots)
