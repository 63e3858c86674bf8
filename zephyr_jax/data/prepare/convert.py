"""The map of preparation: raw rows -> records, and what every rule did to them.

`convert_row` is a pure function of one row. `convert_chunk` runs it over one chunk of a file and
leaves the serialized records and their index in two files, in any process of any machine.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from zephyr_jax import storage
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw import near_duplicates
from zephyr_jax.data.raw.filters import Contaminants, contamination, why_dropped
from zephyr_jax.data.raw.readers import Chunk, read_rows
from zephyr_jax.data.raw.schema import Excerpt, Row, keyed_hash

EXAMPLES = 3  # kept for each rule
OPEN = -1  # the split of a record for which no published split decides, or none yet
INDEX = np.dtype(
    [
        ("source", "<u4"),  # the number of the file
        ("line", "<u4"),  # in the chunk; after `merge` in the file
        ("chunk", "<u4"),
        ("offset", "<u8"),  # in the chunk's records
        ("size", "<u4"),
        ("rules", "<u4"),  # the number of the row's rules in `rule_sets`
        ("prompt", "<u8"),  # hashes of the prompt id, for duplicates and random choices
        ("holdout", "<u8"),
        ("sample", "<u8"),
        ("home", "i1"),  # the split of the file, or OPEN
        ("fate", "i1"),  # the split, or why it is in none: see `select`
        ("original", "<i8"),  # the record that a dropped duplicate repeats, else -1
    ]
)


class Outcome(NamedTuple):
    """What became of one raw row.

    `records` stay. `rules` counts what changed or dropped something by its name; `filtered` has
    the filters among them, with what they met. `unfit` is the reason why the row does not fit the
    schema, or "".
    """

    records: list[Row]
    rules: Counter[str]
    filtered: dict[str, list[str]]
    unfit: str = ""

    def excerpt(self, plan: Plan, row: Row, rule: str) -> Excerpt:
        """Texts of the row that a rule objected to or changed, and the texts after it, or None."""
        if self.filtered.get(rule):
            return self.filtered[rule], None
        if rule in self.filtered:
            return plan.schema.excerpt(rule, row, [])[0], None
        return plan.schema.excerpt(rule, row, self.records)


def convert_row(plan: Plan, contaminants: Contaminants, row: Row | str) -> Outcome:
    """The outcome of a raw row; a str is the reason why the row could not be parsed."""
    unfit = row if isinstance(row, str) else plan.schema.unfit(row)
    if isinstance(row, str) or unfit:
        return Outcome([], Counter(), {}, unfit or "")
    try:
        records, rules = plan.schema.convert(row)
        json.dumps(records, ensure_ascii=False).encode()  # half a surrogate pair has no bytes
    except UnicodeEncodeError:
        return Outcome([], Counter(), {}, "lone_surrogate")
    kept: list[Row] = []
    filtered: dict[str, list[str]] = {}
    for record in records:
        rule = why_dropped(record, plan.filters, contaminants if contaminants.files else None)
        if rule is None:
            kept.append(record)
            continue
        rules[rule] += 1
        found = contamination(record, contaminants) if rule == "contaminated" else None
        filtered.setdefault(rule, list(found or ()))
    return Outcome(kept, rules, filtered)


@dataclasses.dataclass(frozen=True)
class Task:
    """One chunk of one source; `path` and a suffix name the files that it becomes."""

    plan: Plan
    source: int
    chunk: Chunk
    number: int
    folder: Path

    def path(self, suffix: str) -> Path:
        """The file of the serialized records (`.records`) or of the `Converted` (`.pickle`)."""
        return self.folder / f"{self.number:05d}{suffix}"


@dataclasses.dataclass
class Converted:
    """Counts, examples and the index of the records of a chunk, or of all chunks.

    `bad` has the lines of each reason; `examples` has dicts of line, before, after and the number
    of the row's first record or None. `rule_sets` holds the different combinations of rules.
    """

    index: Any = dataclasses.field(default_factory=list)
    signatures: Any = dataclasses.field(default_factory=list)
    rule_sets: dict[tuple[str, ...], int] = dataclasses.field(default_factory=dict)
    rules: Counter[str] = dataclasses.field(default_factory=Counter)
    read: Counter[str] = dataclasses.field(default_factory=Counter)  # by source
    dropped: int = 0
    lines: int = 0
    bad: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


def convert_chunk(task: Task) -> None:
    """Converts a chunk into its two files.

    Raises:
        ValueError: the source is damaged.
    """
    result = Converted()
    storage.write_atomic(task.path(".records"), lambda file: _convert_into(task, result, file))
    result.index = np.array(result.index, INDEX)
    result.signatures = np.array(result.signatures)
    storage.write_atomic(task.path(".pickle"), pickle.dumps(result))


def _convert_into(task: Task, result: Converted, file: IO[bytes]) -> None:
    plan, contaminants = task.plan, task.plan.contaminants()
    name = plan.sources.files[task.source].name
    for result.lines, row in enumerate(read_rows(task.chunk), start=1):
        if row is None:
            continue
        result.read[name] += 1
        outcome = convert_row(plan, contaminants, row)
        if isinstance(row, str) or outcome.unfit:
            result.bad.setdefault(outcome.unfit, []).append(result.lines)
            continue
        for rule in outcome.rules:
            examples = result.examples.setdefault(rule, [])
            if len(examples) < EXAMPLES:
                before, after = outcome.excerpt(plan, row, rule)
                record = len(result.index) if outcome.records and after is not None else None
                example = {"where": result.lines, "split": record, "before": before, "after": after}
                examples.append(example)
        result.rules += outcome.rules
        result.dropped += not outcome.records
        rules = result.rule_sets.setdefault(tuple(outcome.rules), len(result.rule_sets))
        for record in outcome.records:
            _write(task, result, record, rules, file)


def _write(task: Task, result: Converted, record: Row, rules: int, file: IO[bytes]) -> None:
    from zephyr_jax.data.prepare.builders import serialize  # imports TFDS, which takes seconds

    selection, split = task.plan.selection, task.plan.sources.files[task.source].split
    home = OPEN if split is None else task.plan.schema.splits.index(split)
    hashes = [
        keyed_hash(purpose, selection.seed, record["prompt_id"])
        for purpose in ("prompt", "holdout", "sample")
    ]
    offset, size = file.tell(), file.write(serialize(record))
    source = task.source, result.lines, task.number
    result.index.append((*source, offset, size, rules, *hashes, home, OPEN, -1))
    if selection.duplicates == "near":
        result.signatures.append(near_duplicates.signature(record["prompt"]))


def place(plan: Plan, record: np.void) -> str:
    """Source and line of a record of the merged index, as in `train_3.jsonl:17`."""
    return f"{plan.sources.files[record['source']].name}:{record['line']}"


def merge(tasks: Sequence[Task]) -> Converted:
    """The results of all chunks as one, their lines counted from the beginning of each file."""
    total, lines, records = Converted(), Counter[str](), 0
    for task in tasks:
        part: Converted = pickle.loads(task.path(".pickle").read_bytes())
        name = task.plan.sources.files[task.source].name
        for reason, found in part.bad.items():
            places = [f"{name}:{lines[name] + line}" for line in found]
            total.bad.setdefault(reason, []).extend(places)
        for rule, examples in part.examples.items():
            for example in examples:
                example["where"] = f"{name}:{lines[name] + example['where']}"
                if example["split"] is not None:
                    example["split"] += records
            total.examples[rule] = (total.examples.get(rule, []) + examples)[:EXAMPLES]
        numbers = [total.rule_sets.setdefault(s, len(total.rule_sets)) for s in part.rule_sets]
        part.index["rules"] = np.array(numbers, np.uint32)[part.index["rules"]]
        part.index["line"] += lines[name]
        total.index.append(part.index)
        total.signatures.append(part.signatures)
        total.rules += part.rules
        total.read += part.read
        total.dropped += part.dropped
        lines[name] += part.lines
        records += len(part.index)
    total.index = np.concatenate([np.empty(0, INDEX), *total.index])
    near = [signatures for signatures in total.signatures if len(signatures)]
    total.signatures = np.concatenate(near) if near else np.empty((0, 64), np.uint32)
    return total
