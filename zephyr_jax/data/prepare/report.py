"""The report of a prepared set: what was read, kept, dropped and changed, by split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from zephyr_jax.data.prepare.convert import EXAMPLES, Converted, place
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.prepare.select import REASONS
from zephyr_jax.data.raw import sources
from zephyr_jax.data.raw.schema import window

REPORT = "report.json"


def check_rows(plan: Plan, result: Converted) -> dict[str, dict[str, Any]]:
    """The rows that do not fit by reason, the commonest first; the first of each with its place.

    Warns of them, and where a published set has another number of rows.

    Raises:
        ValueError: more rows do not fit than `max_bad_fraction` allows, or the rows are those of
            a known partial copy.
    """
    bad = {reason: {"count": len(p), "first": p[:EXAMPLES]} for reason, p in result.bad.items()}
    bad = dict(sorted(bad.items(), key=lambda item: -item[1]["count"]))
    count, read = sum(entry["count"] for entry in bad.values()), result.read.total()
    reasons = "; ".join(f"{why} {e['count']} ({', '.join(e['first'])})" for why, e in bad.items())
    if count > plan.max_bad_fraction * read:
        raise ValueError(
            f"{count} of {read} rows do not fit, more than max_bad_fraction="
            f"{plan.max_bad_fraction:g}: {reasons}"
        )
    if count:
        logging.warning("%d of %d rows do not fit: %s.", count, read, reasons)
    counts = Counter[str]()
    for name, rows in result.read.items():
        counts[sources.split_of(name)] += rows
    odd = sources.odd_rows(plan.sources.origin, plan.dataset, plan.config_name, counts)
    if odd:
        logging.warning("%s", odd)
    return bad


def make_report(
    plan: Plan,
    result: Converted,
    bad: dict[str, dict[str, Any]],
    prompt_of: Callable[[int], str],
) -> dict[str, Any]:
    """The report as JSON holds it, without the digests of the records.

    Args:
        plan: what was planned.
        result: what all chunks were converted to, after `select`.
        bad: what `check_rows` returned.
        prompt_of: the prompt of a record.

    Raises:
        ValueError: no record is left for training.
    """
    index, fates = result.index, result.index["fate"]
    train, held_out = plan.schema.splits
    names = [train, held_out, *REASONS.values()]
    totals = dict(zip(names, np.bincount(fates, minlength=len(names)).tolist(), strict=True))
    kept = {split: totals.pop(split) for split in (train, held_out)}
    rules = result.rules + Counter(totals)
    read = result.read.total()
    if not kept[train]:
        raise ValueError(
            f"none of the {read} rows read is left for {train}: "
            + (", ".join(f"{rule} {n}" for rule, n in rules.most_common()) or "no rules")
            + f"; {held_out} has {kept[held_out]}: give more rows, or fewer rules"
        )
    if not kept[held_out]:
        logging.warning("No row fell into %s: the set has no such split.", held_out)
    examples = result.examples
    for example in (example for found in examples.values() for example in found):
        if example["split"] is not None:
            example["split"] = names[fates[example["split"]]]
    for code, reason in REASONS.items():
        for record in np.flatnonzero(fates == code)[:EXAMPLES].tolist():
            before, original = [window(prompt_of(record))], int(index["original"][record])
            if original >= 0:
                where = place(plan, index[original])
                before.append(f"as {where}: {window(prompt_of(original))}")
            where = place(plan, index[record])
            example = {"where": where, "split": None, "before": before, "after": None}
            examples.setdefault(reason, []).append(example)
    return {
        "made_from": plan.identity(),
        "origin": plan.sources.origin,
        "splits_by": "file names" if plan.sources.files[0].split else "prompt_id",
        "rows": {
            "read": read,
            "bad": sum(entry["count"] for entry in bad.values()),
            "dropped": result.dropped,  # rules left nothing of them
            "records": len(fates),
            "kept": kept,
        },
        "read_by_source": dict(sorted(result.read.items())),
        "skipped": dict(plan.sources.skipped),
        "rules": dict(rules.most_common()),
        "rules_by_split": _by_split(result, names),
        "bad": bad,
        "examples": examples,
    }


def _by_split(result: Converted, names: list[str]) -> dict[str, dict[str, int]]:
    """The number of records by rule and by where they went."""
    counts: dict[str, Counter[str]] = {}
    for rules, number in result.rule_sets.items():
        fates = result.index["fate"][result.index["rules"] == number]
        by_name = Counter(
            dict(zip(names, np.bincount(fates, minlength=len(names)).tolist(), strict=True))
        )
        for rule in rules:
            counts[rule] = counts.get(rule, Counter[str]()) + by_name
    return {rule: dict(found) for rule, found in counts.items() if found}
