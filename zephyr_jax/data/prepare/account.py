"""The written account of a prepared set: what was read, kept, dropped and changed, by split."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
from absl import logging

from zephyr_jax.data.prepare.convert import EXAMPLES, ConvertTask
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.prepare.select import REASONS, Decisions, place, where
from zephyr_jax.data.prepare.tf_example import first_text
from zephyr_jax.data.raw import hub_sources
from zephyr_jax.data.raw.schema import window

REPORT = "report.json"


class UnfitRows(ValueError):
    """More rows than allowed do not fit; what was converted serves a run that allows more."""


def check_rows(plan: Plan, tasks: list[ConvertTask]) -> None:
    """Warns of rows that do not fit, and where a published set has another number of rows.

    Raises:
        UnfitRows: more rows do not fit than `max_bad_fraction` allows.
        ValueError: the rows are those of a known partial copy.
    """
    told = [json.loads(task.file(".json").read_text()) for task in tasks]
    bad, read = _bad(plan, tasks, told), sum(chunk["read"] for chunk in told)
    count = sum(entry["count"] for entry in bad.values())
    shown = "; ".join(f"{why} {e['count']} ({', '.join(e['first'])})" for why, e in bad.items())
    if count > plan.max_bad_fraction * read:
        raise UnfitRows(
            f"{count} of {read} rows do not fit, more than max_bad_fraction="
            f"{plan.max_bad_fraction:g}: {shown}"
        )
    if count:
        logging.warning("%d of %d rows do not fit: %s.", count, read, shown)
    counts = Counter[str]()
    for task, chunk in zip(tasks, told, strict=True):
        counts[hub_sources.split_of(plan.sources.files[task.source].name)] += chunk["read"]
    odd = hub_sources.odd_rows(plan.sources.origin, plan.dataset, plan.config_name, counts)
    if odd:
        logging.warning("%s", odd)


def account(plan: Plan, tasks: list[ConvertTask], made: Decisions) -> dict[str, Any]:
    """The report as JSON holds it, without the digests of the records.

    Raises:
        ValueError: no record is left for training.
    """
    told = [json.loads(task.file(".json").read_text()) for task in tasks]
    splits = plan.schema.splits
    kept = {split: int((made.codes == code).sum()) for code, split in enumerate(splits)}
    rules = Counter[str]()
    for chunk in told:
        rules.update(chunk["rules"])
    rules.update({name: int((made.codes == code).sum()) for code, name in REASONS.items()})
    rules = Counter({rule: count for rule, count in rules.items() if count})
    read_by_source = Counter[str]()
    for task, chunk in zip(tasks, told, strict=True):
        read_by_source[plan.sources.files[task.source].name] += chunk["read"]
    read = sum(read_by_source.values())
    if not kept[splits[0]]:
        raise ValueError(
            f"none of the {read} rows read is left for {splits[0]}: "
            + (", ".join(f"{rule} {n}" for rule, n in rules.most_common()) or "no rules")
            + f"; {splits[1]} has {kept[splits[1]]}: give more rows, or fewer rules"
        )
    if not kept[splits[1]]:
        logging.warning("No row fell into %s: the set has no such split.", splits[1])
    bad = _bad(plan, tasks, told)
    return {
        "made_from": plan.identity(),
        "origin": plan.sources.origin,
        "splits_by": "file names" if plan.sources.files[0].split else "prompt_id",
        "rows": {
            "read": read,
            "bad": sum(entry["count"] for entry in bad.values()),
            "dropped": sum(chunk["dropped"] for chunk in told),  # rules left nothing of them
            "records": len(made.codes),
            "kept": kept,
        },
        "read_by_source": dict(sorted(read_by_source.items())),
        "skipped": dict(plan.sources.skipped),
        "rules": dict(rules.most_common()),
        "rules_by_split": _by_split(plan, told, made),
        "bad": bad,
        "examples": _examples(plan, tasks, told, made),
    }


def _bad(plan: Plan, tasks: list[ConvertTask], told: list[dict]) -> dict[str, dict[str, Any]]:
    """Reasons, the commonest first, with the number of rows and where the first ones are."""
    bad: dict[str, dict[str, Any]] = {}
    for n, chunk in enumerate(told):
        for reason, found in chunk["bad"].items():
            entry = bad.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += found["count"]
            room = EXAMPLES - len(entry["first"])
            entry["first"] += [place(plan, tasks, n, line) for line in found["lines"][:room]]
    return dict(sorted(bad.items(), key=lambda item: -item[1]["count"]))


def _by_split(plan: Plan, told: list[dict], made: Decisions) -> dict[str, dict[str, int]]:
    """For each rule that left records standing, how many of them went where."""
    fates = [*plan.schema.splits, *REASONS.values()]
    counted: dict[str, Counter[str]] = {}
    starts = np.searchsorted(made.chunk, np.arange(len(told) + 1))
    for n, chunk in enumerate(told):
        here = slice(starts[n], starts[n + 1])
        for rule, bit in chunk["bits"].items():
            touched = made.index["rules"][here] >> np.uint64(bit) & np.uint64(1) > 0
            counts = np.bincount(made.codes[here][touched], minlength=len(fates))
            found = {fate: int(c) for fate, c in zip(fates, counts, strict=True) if c}
            counted.setdefault(rule, Counter()).update(found)
    return {rule: dict(counts) for rule, counts in counted.items() if counts}


def _examples(
    plan: Plan, tasks: list[ConvertTask], told: list[dict], made: Decisions
) -> dict[str, list[dict[str, Any]]]:
    """The first rows that each rule touched, with their split, texts before and after."""
    fates = [*plan.schema.splits, *REASONS.values()]
    starts = np.searchsorted(made.chunk, np.arange(len(tasks)))
    examples: dict[str, list[dict[str, Any]]] = {}
    for n, chunk in enumerate(told):
        for rule, found in chunk["examples"].items():
            shown = examples.setdefault(rule, [])
            for example in found[: EXAMPLES - len(shown)]:
                record = example["record"]
                split = None if record is None else fates[made.codes[starts[n] + record]]
                shown.append(
                    {
                        "where": place(plan, tasks, n, example["line"]),
                        "split": split,
                        "before": example["before"],
                        "after": example["after"],
                    }
                )
    for code, name in REASONS.items():
        for record in np.flatnonzero(made.codes == code)[:EXAMPLES]:
            twin = int(made.twins[record])
            of = [f"as {where(plan, tasks, made, twin)}: {_prompt(tasks, made, twin)}"]
            examples.setdefault(name, []).append(
                {
                    "where": where(plan, tasks, made, int(record)),
                    "split": None,
                    "before": [_prompt(tasks, made, int(record)), *of * (twin >= 0)],
                    "after": None,
                }
            )
    return examples


def _prompt(tasks: list[ConvertTask], made: Decisions, record: int) -> str:
    chunk, at = int(made.chunk[record]), int(made.place[record])
    sizes = made.index["size"][made.chunk == chunk]
    with tasks[chunk].file(".records").open("rb") as file:
        file.seek(int(sizes[:at].sum()))
        return window(first_text(file.read(int(sizes[at])), "prompt"))
