"""The first stage: one chunk of raw rows -> staged records, an index of them, and counts.

Chunks know nothing of each other, so any number of processes can work on them, and what is done
is not done again after a kill. What is decided over all records comes later, from the indexes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zephyr_jax.data.prepare import tf_example
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw import near_duplicates
from zephyr_jax.data.raw.filters import contamination, why_dropped
from zephyr_jax.data.raw.readers import Chunk, chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash

EXAMPLES = 3  # kept for each rule
# `row` is the line in the chunk; `prompt` stands for the prompt's id; `rules` has a bit for
# each rule of the chunk that had a say.
INDEX = np.dtype(
    [
        ("row", "<u4"),
        ("size", "<u4"),
        ("prompt", "<u8"),
        ("holdout", "<u8"),
        ("sample", "<u8"),
        ("rules", "<u8"),
    ]
)


@dataclasses.dataclass(frozen=True)
class ConvertTask:
    """One chunk of one source, and the folder and number under which its records wait."""

    plan: Plan
    source: int
    chunk: Chunk
    folder: Path
    number: int

    def file(self, suffix: str) -> Path:
        """Where something of this chunk is: `.records`, `.npy`, `.signatures.npy`, `.json`."""
        return self.folder / f"{self.number:05d}{suffix}"


def convert_tasks(plan: Plan, folder: Path) -> list[ConvertTask]:
    """The chunks of all sources; held-out files go first, so that training rows can meet them."""
    files = list(enumerate(plan.sources.files))
    files.sort(key=lambda entry: entry[1].split != plan.schema.splits[1])
    parts = [(at, chunk) for at, source in files for chunk in chunks_of(source.path)]
    return [ConvertTask(plan, at, chunk, folder, n) for n, (at, chunk) in enumerate(parts)]


def convert_chunk(task: ConvertTask) -> None:
    """Converts one chunk, unless that is done.

    Raises:
        ValueError: the file is damaged.
    """
    if task.file(".json").exists():
        return
    work = _Conversion(task.plan)
    with publish(task.file(".records")) as temporary, temporary.open("wb") as out:
        for line, row in enumerate(read_rows(task.chunk), start=1):
            work.lines = line
            if row is not None:
                work.take(row, out)
    with publish(task.file(".npy")) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(work.index, INDEX))
    if task.plan.selection.duplicates == "near":
        with publish(task.file(".signatures.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(work.signatures, np.uint32).reshape(len(work.index), -1))
    with publish(task.file(".json")) as temporary:
        temporary.write_text(json.dumps(work.told()))


class publish:
    """Gives a temporary path beside the final one and moves it there when all went well."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


class _Conversion:
    """What has been made of a chunk so far."""

    def __init__(self, plan: Plan):
        self.lines = 0
        self.index: list[tuple[int, int, int, int, int, int]] = []
        self.signatures: list[np.ndarray] = []
        self._plan = plan
        self._contaminants = plan.contaminants
        self._near = plan.selection.duplicates == "near"
        self._read = self._dropped = 0
        self._rules: Counter[str] = Counter()
        self._bits: dict[str, int] = {}
        self._bad: dict[str, dict[str, Any]] = {}
        self._examples: dict[str, list[dict[str, Any]]] = {}

    def take(self, row: Row | str, out: BinaryIO) -> None:
        """One row: count it as unfit, or convert, filter and stage it."""
        schema, self._read = self._plan.schema, self._read + 1
        if isinstance(row, str):
            return self._reject(row)
        missing = schema.missing(row)
        problem = f"missing_key:{missing}" if missing else schema.problem(row)
        if problem is not None:
            return self._reject(problem)
        try:
            records, counts = schema.convert(row)
            kept, lost = self._filtered(row, records)
            staged = [tf_example.encode(record) for record in kept]
        except UnicodeEncodeError:
            return self._reject("lone_surrogate")
        for rule in counts:
            if len(self._examples.setdefault(rule, [])) < EXAMPLES:
                self._show(rule, *schema.excerpt(rule, row, kept), first=bool(kept))
        counts.update(lost)
        self._rules.update(counts)
        bits = sum(1 << self._bits.setdefault(rule, len(self._bits)) for rule in counts)
        self._dropped += not kept
        for record, example in zip(kept, staged, strict=True):
            self._add(record, len(example), bits)
            out.write(example)
        return None

    def _filtered(self, row: Row, records: list[Row]) -> tuple[list[Row], Counter[str]]:
        """The records that no filter leaves out, and the filters that left some out."""
        kept, lost = [], Counter[str]()
        for record in records:
            rule = why_dropped(record, self._plan.filters, self._contaminants)
            if rule is None:
                kept.append(record)
                continue
            lost[rule] += 1
            if len(self._examples.setdefault(rule, [])) < EXAMPLES:
                before, _ = self._plan.schema.excerpt(rule, row, [])
                if rule == "contaminated":
                    before = [*map(str, contamination(record, self._contaminants) or ())]
                self._show(rule, before, None, first=False)
        return kept, lost

    def _show(self, rule: str, before: list[str], after: list[str] | None, first: bool) -> None:
        """Keeps an example; `first`: its record is the next one of the index."""
        record = len(self.index) if first else None
        shown = {"line": self.lines, "record": record, "before": before, "after": after}
        self._examples[rule].append(shown)

    def _add(self, record: Row, size: int, bits: int) -> None:
        seed, prompt_id = self._plan.selection.seed, record["prompt_id"]
        prompt, holdout, sample = (
            keyed_hash(purpose, seed, prompt_id) for purpose in ("prompt", "holdout", "sample")
        )
        self.index.append((self.lines, size, prompt, holdout, sample, bits))
        if self._near:
            self.signatures.append(near_duplicates.signature(record["prompt"]))

    def _reject(self, reason: str) -> None:
        bad = self._bad.setdefault(reason, {"count": 0, "lines": []})
        bad["count"] += 1
        if len(bad["lines"]) < EXAMPLES:
            bad["lines"].append(self.lines)

    def told(self) -> dict[str, Any]:
        """The counts and examples, as JSON holds them."""
        return {
            "lines": self.lines,
            "read": self._read,
            "dropped": self._dropped,
            "bad": self._bad,
            "rules": dict(self._rules),
            "bits": self._bits,
            "examples": self._examples,
        }
