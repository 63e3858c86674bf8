"""Sections about data: rules with their examples, packed sets, and histograms of lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.cards import Card, Span, diff_spans
from zephyr_jax.reports.html import Page, cut, percent
from zephyr_jax.reports.inspect import OPTIONS
from zephyr_jax.reports.plots import Histogram

_LIMITS = (512, 1024, 2048, 4096, 8192)
SAMPLE = 20_000  # records or rows that histograms are drawn of at most
_RULES = {
    "truecase": ("capitalization fixed at sentence starts and for “I”", "changed"),
    "refusal": ("the assistant refuses in a stock phrase", "dropped"),
    "empty_turn": ("a turn is blank", "dropped"),
    "odd_dialogue": ("the last question has no answer", "dropped"),
    "empty_dialogue": ("no turns at all", "dropped"),
    "score_10_to_1": ("a 10 whose ratings say it was a 1", "score fixed"),
    "score_10_estimated": ("a doubtful 10, set to twice the mean rating", "score fixed"),
    "score_10_kept": ("a 10 that its ratings confirm", "kept"),
    "score_10_reannotated": ("a 10 that was rated a second time", "kept"),
    "score_10_unrated": ("a 10 without ratings to check it by", "kept"),
    "tie": ("both answers of the pair have the same score", "kept"),
    "unscored_completion": ("an answer without a score", "answer dropped"),
}


def add_prepared_set(page: Page, report: dict[str, Any]) -> None:
    """Adds what was read, kept and dropped of a set and by which rules, from its `report.json`."""
    rows = report["rows"]
    counts = {"records read": rows["read"]}
    counts |= {f"kept for {split}": count for split, count in rows["kept"].items()}
    counts |= {"dropped": rows["read"] - sum(rows["kept"].values())}
    counts |= {"of these, invalid": rows["bad"]}
    shares = [
        [name, f"{count:,}", percent(count / max(rows["read"], 1))]
        for name, count in counts.items()
    ]
    page.table(["", "records", "share"], shares, 1)
    rules = [
        [rule, *_RULES.get(rule, ("", "dropped")), f"{count:,}"]
        for rule, count in report["rules"].items()
    ]
    if rules:
        details = page.details("What each rule did, with examples")
        details.table(["rule", "", "effect", "count"], rules, 3)
        for rule, examples in report["examples"].items():
            details.text(f"{rule}: {examples[0]['where']}", "soft")
            before, after = examples[0]["before"], examples[0]["after"]
            left = [Span(f"{cut(text).strip() or '(blank)'}\n") for text in before]
            cards = [Card("before", left or [Span("(no turns)", "dim")])]
            details.cards([*cards, Card("after", _after(before, after))], parallel=True)


def _after(before: list[str], after: list[str] | None) -> list[Span]:
    """What a rule left of some texts, with the changed words marked."""
    if after is None:
        return [Span("(dropped)", "dim")]
    spans = []
    if len(after) == len(before):
        for one, other in zip(before, after, strict=True):
            changes = diff_spans(cut(one), cut(other))
            spans += [span for span in changes if span.style != "removed"] + [Span("\n")]
        return spans
    names = ("chosen", "rejected")  # ratings became a pair
    return [Span(f"{name}  {cut(x)}\n") for name, x in zip(names, after, strict=False)]


def add_packed_set(page: Page, manifest: dict[str, Any]) -> None:
    """Adds a table of what became of the documents, from a packed set's manifest."""
    splits = manifest["splits"]
    rows = []
    for name in dict.fromkeys(name for split in splits.values() for name in split):
        values = [split.get(name, "") for split in splits.values()]  # some are of one split alone
        if any(isinstance(value, int | float) for value in values):  # and not a digest
            number = percent if name == "padding_share" else "{:,}".format
            shown = [number(value) if value != "" else "" for value in values]
            rows.append([name.replace("_", " "), *shown])
    made = manifest["made_from"]
    about = f"{made['stage'].upper()}: rows of {manifest['seq_len']} tokens"
    if manifest.get("rows_per_batch"):
        about += (
            f", {manifest['rows_per_batch']} rows for a batch of {made['batch_size']} pairs, "
            f"{made['epochs']} epochs planned"
        )
    page.table(["", *("held-out" if x == "eval" else x for x in splits)], rows, 1, about)


def sample_indices(total: int) -> Sequence[int]:
    """All indices below `total`, or `SAMPLE` of them at random."""
    if total <= SAMPLE:
        return range(total)
    return np.sort(np.random.default_rng(0).choice(total, SAMPLE, replace=False)).tolist()


def add_records(page: Page, split: str, records: Sequence[Row], tok: Tokenizer | None) -> None:
    """Adds histograms of the lengths of a split's records, and of the score margins of pairs."""
    indices = sample_indices(len(records))
    bar = tqdm(indices, desc=f"measure {split}", unit="record", disable=None)
    numbers: dict[str, list[float]] = defaultdict(list)
    for index in bar:
        try:
            measured = record_numbers(records[index], tok)
        except ValueError as error:
            raise ValueError(f"{split}, record {index}: {error}") from error
        for name, value in measured.items():
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
        head = ["longer than", "records", "share"]
        page.table(head, rows, 1, "Records longer than a sequence length")


def record_numbers(record: Row, tok: Tokenizer | None) -> dict[str, float]:
    """Lengths of a record in tokens or else characters, and of a pair its score margin."""
    if "messages" in record:
        messages = record["messages"]
        if tok is None:
            return {"length": _characters(messages)}
        return {"length": len(render_chat(tok, messages, **OPTIONS)[0])}
    if tok is not None:
        answers = (record[side][-1]["content"] for side in ("chosen", "rejected"))
        ids = render_pair(tok, record["chosen"][:-1], *answers, **OPTIONS)
        prompt, chosen, rejected = map(len, ids)
    else:
        prompt = _characters(record["chosen"][:-1])
        chosen, rejected = (_characters(record[side][-1:]) for side in ("chosen", "rejected"))
    return {
        "length": prompt + max(chosen, rejected),  # of the longer dialogue
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": record["score_chosen"] - record["score_rejected"],
    }


def _characters(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def add_rows(page: Page, packed: PackedSet, split: str) -> None:
    """Adds histograms of how full the rows of a packed split are, and of their documents."""
    source, total = packed.rows(split), packed.manifest["splits"][split]["rows"]
    indices = sample_indices(total)
    numbers: dict[str, list[float]] = defaultdict(list)
    for index in indices:
        (row,) = source.read([index])
        lengths = np.bincount(row["segments"])[1:]
        numbers["fill"].append(float((row["segments"] > 0).mean()))
        numbers["documents"].append(len(lengths))
        numbers["length"] += lengths.tolist()
        numbers["targets"] += np.bincount(row["segments"], row["loss_mask"])[1:].tolist()
    titles = {
        "fill": "Non-padding fraction of the rows",
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
