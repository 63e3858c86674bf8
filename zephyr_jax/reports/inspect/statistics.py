"""Numbers over many records or rows for a page: lengths, score margins, how full rows are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

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


def sample_indices(total: int, requested: int) -> Sequence[int]:
    """All indices below `total`, or as many as requested; 0: `SAMPLE`, if over `ALL_UP_TO`."""
    size = requested or (total if total <= ALL_UP_TO else SAMPLE)
    if total <= size:
        return range(total)
    drawn = np.random.default_rng(0).choice(total, size, replace=False)
    return sorted(map(int, drawn))


def add_records(
    page: Page, split: str, records: Sequence[Row], tok: Tokenizer | None, sample: int
) -> None:
    """Adds histograms of the lengths of a split's records, and of the score margins of pairs."""
    indices = sample_indices(len(records), sample)
    bar = tqdm(indices, desc=f"measure {split}", unit="record", disable=None)
    numbers: dict[str, list[float]] = defaultdict(list)
    for index in bar:
        for name, value in record_numbers(records[index], tok).items():
            numbers[name].append(value)
    unit = "tokens" if tok else "characters"
    titles = {
        "length": f"Length in {unit}",
        "prompt": f"Prompt, {unit}",
        "chosen": f"Chosen answer, {unit}",
        "rejected": f"Rejected answer, {unit}",
        "margin": "Score margin, chosen minus rejected",
    }
    page.heading(split)
    page.text(f"{len(indices):,} of {len(records):,} records", "soft")
    _add_histograms(page, numbers, titles, "records")
    if tok:
        lengths = np.asarray(numbers["length"])
        over = [(limit, int((lengths > limit).sum())) for limit in _LIMITS]
        rows = [[f"{limit:,} tokens", f"{n:,}", percent(n / len(lengths))] for limit, n in over]
        page.table(["longer than", "records", "share"], rows, 1, "What rows of a length would cut")


def record_numbers(record: Row, tok: Tokenizer | None) -> dict[str, float]:
    """The length of a record, in tokens or else characters, and of a pair its score margin.

    `length` is of a whole dialogue, of a pair's prompt with its longer answer; pairs also have
    `prompt`, `chosen`, `rejected` and `margin` (chosen minus rejected).
    """
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


def _characters(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def add_rows(page: Page, packed: PackedSet, split: str, sample: int) -> None:
    """Adds histograms of how full the rows of a packed split are, and of their documents."""
    source, total = packed.rows(split), packed.manifest["splits"][split]["rows"]
    indices = sample_indices(total, sample)
    numbers: dict[str, list[float]] = defaultdict(list)
    for index in indices:
        (row,) = source.read([index])
        lengths = np.bincount(row["segments"])[1:]
        numbers["fill"].append(float((row["segments"] > 0).mean()))
        numbers["documents"].append(len(lengths))
        numbers["length"] += lengths.tolist()
        numbers["targets"] += np.bincount(row["segments"], row["loss_mask"])[1:].tolist()
    titles = {
        "fill": "Fill of the rows, share of positions",
        "documents": "Documents in a row",
        "length": "Length of a document, tokens",
        "targets": "Target tokens of a document",
    }
    page.text(f"{split}: {len(indices):,} of {total:,} rows", "soft")
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
