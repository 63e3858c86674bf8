"""The map of preparation: raw rows -> records, and what every rule did to them.

`convert_row` is a pure function of one row. `convert_chunk` runs it over one chunk of a file and
leaves the serialized records and their index in two files, in any process of any machine.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from zephyr_jax import storage
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw.filters import Contaminants, contamination, length_fault, signature
from zephyr_jax.data.raw.readers import Chunk, read_rows
from zephyr_jax.data.raw.schema import Row, Schema, keyed_hash, window

EXAMPLES = 3  # kept for each rule
OPEN = -1  # the split of a record for which no published split decides, or none yet
INDEX = np.dtype(
    [
        ("source", "<u4"),  # the number of the file
        ("line", "<u4"),  # in the chunk; after `merge` in the file
        ("chunk", "<u4"),
        ("offset", "<u8"),  # in the chunk's records
        ("size", "<u4"),
        ("prompt", "<u8"),  # hashes of the prompt id, for duplicates and random choices
        ("holdout", "<u8"),
        ("sample", "<u8"),
        ("home", "i1"),  # the split of the file, or OPEN
        ("fate", "i1"),  # the split, or why it is in none: see `select`
        ("original", "<i8"),  # the record that a dropped duplicate repeats, else -1
    ]
)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Outcome(NamedTuple):
    """What became of one raw row."""

    records: Sequence[Row]  # several only for `pairing="all"`
    rules: Counter[str]  # what changed or dropped something
    shared: Sequence[str] = ()  # where a record meets a benchmark
    unfit: str = ""  # the reason why the row does not fit the schema


def convert_row(plan: Plan, contaminants: Contaminants, row: Row | str) -> Outcome:
    """The outcome of a raw row; a str is the reason why the row could not be parsed."""
    unfit = row if isinstance(row, str) else plan.schema.unfit(row)
    if isinstance(row, str) or unfit:
        return Outcome([], Counter(), unfit=unfit or "")
    try:
        records, rules = plan.schema.convert(row)
        json.dumps(records, ensure_ascii=False).encode()  # half a surrogate pair has no bytes
    except UnicodeEncodeError:
        return Outcome([], Counter(), unfit="lone_surrogate")
    kept, rules, shared, limits = [], Counter(rules), [], plan.selection
    for record in records:
        rule = length_fault(record, limits.max_chars, limits.min_answer_chars, limits.max_turns)
        if rule is None and (match := contamination(record, contaminants, limits.ngram)):
            rule, shared = "contaminated", match
        if rule is None:
            kept.append(record)
        else:
            rules[rule] += 1
    return Outcome(kept, rules, shared)


def example_of(
    schema: Schema, row: Row, outcome: Outcome, rule: str
) -> tuple[list[str], list[str] | None]:
    """Texts of a row that a rule dropped or changed, and of its first record, None without one."""
    if rule == "contaminated":
        return list(outcome.shared), None
    before = schema.texts(row, rule)
    after = schema.texts(outcome.records[0], rule) if outcome.records else []
    if len(before) == len(after):
        for old, new in zip(before, after, strict=True):
            if old != new:
                same = (a == b for a, b in zip(old, new, strict=False))
                at = next((at for at, equal in enumerate(same) if not equal), 0)
                return [window(old, at)], [window(new, at)]
    # Otherwise the first and the last texts.
    shown = [[window(text) for text in (*t[:2], *t[2:][-2:])] for t in (before, after)]
    return shown[0], shown[1] if outcome.records else None


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
    """Counts, examples and the index of the records of a chunk, or of all chunks."""

    index: Any = dataclasses.field(default_factory=list)
    signatures: Any = dataclasses.field(default_factory=list)
    rules: Counter[str] = dataclasses.field(default_factory=Counter)
    read: Counter[str] = dataclasses.field(default_factory=Counter)  # by source
    dropped: int = 0
    lines: int = 0
    bad: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # lines by reason
    # By rule; each has where (the line), before and after.
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


def convert_chunk(task: Task) -> None:
    """Converts a chunk into its two files."""
    result = Converted()
    storage.write_atomic(task.path(".records"), lambda file: _convert_into(task, result, file))
    result.index = np.array(result.index, INDEX)
    result.signatures = np.array(result.signatures, np.uint32).reshape(-1, 64)
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
                before, after = example_of(plan.schema, row, outcome, rule)
                examples.append({"where": result.lines, "before": before, "after": after})
        result.rules += outcome.rules
        result.dropped += not outcome.records
        for record in outcome.records:
            _write(task, result, record, file)


def _write(task: Task, result: Converted, record: Row, file: IO[bytes]) -> None:
    from zephyr_jax.data.prepare.builders import serialize  # imports TFDS, which takes seconds

    selection, split = task.plan.selection, task.plan.sources.files[task.source].split
    home = OPEN if split is None else task.plan.schema.splits.index(split)
    hashes = [
        keyed_hash(purpose, selection.seed, record["prompt_id"])
        for purpose in ("prompt", "holdout", "sample")
    ]
    offset, size = file.tell(), file.write(serialize(record))
    source = task.source, result.lines, task.number
    result.index.append((*source, offset, size, *hashes, home, OPEN, -1))
    if selection.duplicates == "near":
        result.signatures.append(signature(record["prompt"]))


def place(plan: Plan, record: np.void) -> str:
    """Source and line of a record of the merged index, as in `train_3.jsonl:17`."""
    return f"{plan.sources.files[record['source']].name}:{record['line']}"


def merge(tasks: Sequence[Task]) -> Converted:
    """The results of all chunks as one, their lines counted from the beginning of each file."""
    total, lines = Converted(), Counter[str]()
    for task in tasks:
        part: Converted = pickle.loads(task.path(".pickle").read_bytes())
        name = task.plan.sources.files[task.source].name
        for reason, numbers in part.bad.items():
            places = [f"{name}:{lines[name] + line}" for line in numbers]
            total.bad.setdefault(reason, []).extend(places)
        for rule, examples in part.examples.items():
            for example in examples:
                example["where"] = f"{name}:{lines[name] + example['where']}"
            total.examples[rule] = (total.examples.get(rule, []) + examples)[:EXAMPLES]
        part.index["line"] += lines[name]
        total.index.append(part.index)
        total.signatures.append(part.signatures)
        total.rules += part.rules
        total.read += part.read
        total.dropped += part.dropped
        lines[name] += part.lines
    total.index = np.concatenate([np.empty(0, INDEX), *total.index])
    total.signatures = np.concatenate([np.empty((0, 64), np.uint32), *total.signatures])
    return total


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Makes a worker end when its parent is killed; it would wait for tasks forever."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(
    function: Callable[[Item], Result], tasks: Sequence[Item], workers: int, title: str
) -> list[Result]:
    """The results of `function` in the order of the tasks; the first exception is raised.

    Function, tasks and results are pickled, unless one worker leaves all to this process.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        return list(tqdm(map(function, tasks), title, len(tasks)))
    # A forked child would inherit the threads' locks of JAX, TFDS and the progress bar.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        return list(tqdm(pool.map(function, tasks), title, len(tasks)))


def run_on_beam(
    function: Callable[[Item], None], tasks: Sequence[Item], options: Sequence[str]
) -> None:
    """Runs every task as one element of a Beam pipeline; Beam may run a task twice.

    `function` leaves its result in a file that every worker can reach; options have no dashes.
    """
    try:
        beam: Any = importlib.import_module("apache_beam")
        settings: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--beam needs Apache Beam, in an environment of its own: pip install 'zephyr_jax[beam]'"
        ) from error
    pipeline_options = settings.PipelineOptions([f"--{option}" for option in options])
    with beam.Pipeline(options=pipeline_options) as pipeline:
        _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(function)
