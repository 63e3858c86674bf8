"""Which records go to which split, over the index of all chunks in memory; and the report of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from zephyr_jax.data.prepare.convert import EXAMPLES, OPEN, Converted, place
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw.filters import near_duplicates
from zephyr_jax.data.raw.schema import window
from zephyr_jax.data.raw.sources import odd_row_counts

REPORT = "report.json"
# The fate of a record: 0 for the training split, 1 for the held-out split, or why it is in neither.
OVERLAP, DUPLICATE, NEAR_DUPLICATE, SAMPLED_OUT = 2, 3, 4, 5
REASONS = {
    OVERLAP: "train_test_overlap",
    DUPLICATE: "duplicate_prompt",
    NEAR_DUPLICATE: "near_duplicate_prompt",
    SAMPLED_OUT: "sampled_out",
}
# The rows at which the hub's automatic conversion of raw UltraChat to parquet stopped.
PARTIAL_ULTRACHAT = 773_913


def check_rows(plan: Plan, result: Converted) -> dict[str, dict[str, Any]]:
    """The rows that do not fit by reason, the commonest first; the first of each with its place.

    A ValueError if they are more than `max_bad_fraction` allows, or of a known partial copy.
    """
    bad = {reason: {"count": len(p), "first": p[:EXAMPLES]} for reason, p in result.bad.items()}
    bad = dict(sorted(bad.items(), key=lambda item: -item[1]["count"]))
    count, read = sum(entry["count"] for entry in bad.values()), result.read.total()
    shown = [f"{why} {e['count']} ({', '.join(e['first'])})" for why, e in bad.items()]
    more = f"; and {len(shown) - 8} more reasons" if len(shown) > 8 else ""
    reasons = "; ".join(shown[:8]) + more
    if count > plan.max_bad_fraction * read:
        raise ValueError(
            f"{count} of {read} rows do not fit, more than max_bad_fraction="
            f"{plan.max_bad_fraction:g}: {reasons}; correct or remove them, or raise it"
        )
    if count:
        logging.warning("%d of %d rows do not fit: %s.", count, read, reasons)
    if odd := odd_row_counts(plan.sources.origin, result.read):
        logging.warning("%s: the set has changed, or a file is incomplete.", odd)
    if (plan.dataset, plan.config_name, read) == ("ultrachat", "raw", PARTIAL_ULTRACHAT):
        raise ValueError(
            f"{read:,} rows are the hub's partial conversion of UltraChat to parquet, not its "
            "1,468,348 rows: take train_0.jsonl to train_9.jsonl of stingning/ultrachat"
        )
    return bad


def select(plan: Plan, result: Converted) -> None:
    """Decides the fate of every record, in the merged index.

    A ValueError if published splits share a prompt, or there are fewer records than wanted.
    """
    selection, index = plan.selection, result.index
    fates, home = index["fate"], index["home"]
    overlap = (home == 0) & np.isin(index["prompt"], index["prompt"][home == 1])
    if overlap.any() and not selection.drop_overlap:
        raise ValueError(
            f"{place(plan, index[overlap][0])}: this prompt of the training split is in the "
            f"held-out split too, as are those of {int(overlap.sum()) - 1} more rows, so "
            f"evaluation would see training text; --drop_overlap leaves such rows out of training"
        )
    fates[overlap] = OVERLAP
    if selection.duplicates != "keep":
        left = np.flatnonzero(fates == OPEN)
        _, first, of = np.unique(index["prompt"][left], return_index=True, return_inverse=True)
        _drop_repeated(index, DUPLICATE, left, left[first[of]])
    if selection.duplicates == "near":
        left = np.flatnonzero(fates == OPEN)
        near = near_duplicates(result.signatures[left], selection.near_threshold)
        _drop_repeated(index, NEAR_DUPLICATE, left, np.where(near < 0, left, left[near]))
    if selection.rows is not None:
        _select_sizes(selection.rows, index)
        return
    if selection.sample < 1.0:
        unused = index["sample"] >= np.uint64(int(selection.sample * 2.0**64))
        fates[(fates == OPEN) & unused] = SAMPLED_OUT
    held_out = index["holdout"] < np.uint64(int(selection.fraction_held_out * 2.0**64))
    split = np.where(home == OPEN, held_out.astype(np.int8), home)
    fates[fates == OPEN] = split[fates == OPEN]


def _drop_repeated(index: np.ndarray, reason: int, left: np.ndarray, kept: np.ndarray) -> None:
    """Drops records that repeat a kept one of another row; those of one row share its fate."""
    rows = index["source"].astype(np.uint64) << np.uint64(32) | index["line"]
    repeated = rows[left] != rows[kept]
    index["fate"][left[repeated]] = reason
    index["original"][left[repeated]] = kept[repeated]


def _select_sizes(rows: tuple[int, int], index: np.ndarray) -> None:
    """Selects exactly the wanted numbers of records, in a random order of complete prompts."""
    fates = index["fate"]
    for split, purpose, name in ((1, "holdout", "the held-out split"), (0, "sample", "training")):
        left = np.flatnonzero((fates == OPEN) & (index["home"] != 1 - split))
        wanted = rows[split]
        if len(left) < wanted:
            raise ValueError(
                f"rows wants {wanted} records for {name}, but only {len(left)} are left"
            )
        prompts = index["prompt"][left]
        order = np.lexsort((left, prompts, index[purpose][left]))
        left, prompts = left[order], prompts[order]
        starts = np.flatnonzero(prompts[1:] != prompts[:-1]) + 1
        for records in np.split(left, starts):
            if len(records) <= wanted:
                fates[records] = split
                wanted -= len(records)
        if wanted:
            raise ValueError(
                f"rows={rows[split]} for {name} cannot be met by complete prompts: {wanted} short; "
                f"give another number"
            )
    fates[fates == OPEN] = SAMPLED_OUT


def make_report(
    plan: Plan, result: Converted, bad: dict[str, dict[str, Any]], prompt_of: Callable[[int], str]
) -> dict[str, Any]:
    """The report as JSON, without the digests of the records; a ValueError if none is for training.

    `bad` is what `check_rows` returned; `prompt_of` gives the prompt of a record.
    """
    index, fates = result.index, result.index["fate"]
    train, held_out = plan.schema.splits
    kept = {split: int((fates == fate).sum()) for fate, split in enumerate(plan.schema.splits)}
    left_out = {reason: int((fates == fate).sum()) for fate, reason in REASONS.items()}
    rules = result.rules + Counter(left_out)
    read = result.read.total()
    if not kept[train]:
        counts = ", ".join(f"{rule} {n}" for rule, n in rules.most_common()) or "no rules"
        raise ValueError(
            f"none of the {read} rows read is left for {train}: {counts}; {held_out} has "
            f"{kept[held_out]}: give more rows, or fewer rules"
        )
    if not kept[held_out]:
        logging.warning(
            "No row is held out, so the set has no split %s: take a larger --holdout, or train "
            "without evaluation: --config.data.splits=\"('%s', '')\"",
            *(held_out, train),
        )
    examples = result.examples
    for fate, reason in REASONS.items():
        for record in np.flatnonzero(fates == fate)[:EXAMPLES].tolist():
            before, original = [window(prompt_of(record))], int(index["original"][record])
            if original >= 0:
                before.append(f"as {place(plan, index[original])}: {window(prompt_of(original))}")
            example = {"where": place(plan, index[record]), "before": before, "after": None}
            examples.setdefault(reason, []).append(example)
    return {
        "made_from": plan.identity(),
        "origin": plan.sources.origin,
        "splits_by": "file names" if plan.sources.files[0].split else "prompt_id",
        "rows": {
            "read": read,
            "bad": sum(entry["count"] for entry in bad.values()),
            "dropped": result.dropped,  # by a rule about one row
            "records": len(fates),
            "kept": kept,
        },
        "read_by_source": dict(sorted(result.read.items())),
        "skipped": dict(plan.sources.skipped),
        "rules": dict(rules.most_common()),
        "bad": bad,
        "examples": examples,
    }
