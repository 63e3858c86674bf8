"""What becomes of one raw row, and which split each record goes to, with a report of both."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from zephyr_jax.data.prepare.prepare import Plan
from zephyr_jax.data.raw import filters
from zephyr_jax.data.raw.schema import BadRow, Row, Schema, window
from zephyr_jax.storage import read_json, verify

EXAMPLES = 3  # kept for each rule
OPEN = -1  # the split of a record for which no published split decides, or none yet
# The fate of a record: 0 for the training split, 1 for the held-out split, or why it is in neither.
OVERLAP, DUPLICATE, NEAR_DUPLICATE, SAMPLED_OUT = range(2, 6)
REASONS = ("train_test_overlap", "duplicate_prompt", "near_duplicate_prompt", "sampled_out")
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
        ("fate", "i1"),
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


def convert_row(plan: Plan, contaminants: filters.Contaminants, row: Row | str) -> Outcome:
    """The outcome of a raw row; a str is the reason why the row could not be parsed."""
    if isinstance(row, str):
        return Outcome([], Counter(), unfit=row)
    try:
        records, rules = plan.schema.read(row)
        json.dumps(records, ensure_ascii=False).encode()  # half a surrogate pair has no bytes
    except (UnicodeEncodeError, RecursionError, TypeError, BadRow) as error:
        reasons = {UnicodeEncodeError: "lone_surrogate", RecursionError: "too_deep"}
        return Outcome([], Counter(), unfit=reasons.get(type(error), str(error)))
    kept, rules, shared, limits = [], Counter(rules), [], plan.selection
    for record in records:
        sizes = limits.max_chars, limits.min_answer_chars, limits.max_turns
        rule = filters.length_fault(record, *sizes)
        if rule is None and (match := filters.contamination(record, contaminants, limits.ngram)):
            rule, shared = "contaminated", match
        if rule is None:
            kept.append(record)
        else:
            rules[rule] += 1
    return Outcome(kept, rules, shared)


def example_of(
    schema: Schema, row: Row | str, outcome: Outcome, rule: str
) -> tuple[list[str], list[str] | None]:
    """Texts of a row that a rule dropped or changed, and of its first record, None without one."""
    if isinstance(row, str) or rule in ("contaminated", outcome.unfit):
        return list(outcome.shared), None
    before = schema.texts(row, rule)
    after = schema.texts(outcome.records[0], rule) if outcome.records else []
    changed = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
    if changed and len(before) == len(after):
        old, new = changed[0]
        same = (a == b for a, b in zip(old, new, strict=False))
        at = next((at for at, equal in enumerate(same) if not equal), 0)
        return [window(old, at)], [window(new, at)]
    # Otherwise the first and the last texts.
    shown = [[window(text) for text in (*t[:2], *t[2:][-2:])] for t in (before, after)]
    return shown[0], shown[1] if outcome.records else None


@dataclasses.dataclass
class Converted:
    """Counts, examples and the index of the records of a chunk, or of all chunks."""

    index: Any = dataclasses.field(default_factory=list)
    signatures: list[Any] = dataclasses.field(default_factory=list)
    rules: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: Counter[str] = dataclasses.field(default_factory=Counter)  # rows, by reason
    read: Counter[str] = dataclasses.field(default_factory=Counter)  # by source
    dropped: int = 0
    lines: int = 0
    # By rule or reason; each has where (the line), before and after.
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


def place(plan: Plan, record: np.void) -> str:
    """Source and line of a record of the merged index, as in `train_3.jsonl:17`."""
    return f"{plan.sources.files[record['source']].name}:{record['line']}"


def check_rows(plan: Plan, result: Converted) -> dict[str, dict[str, Any]]:
    """The rows that do not fit, by reason, commonest first; a ValueError if they are too many."""
    bad = {
        reason: {"count": n, "first": [one["where"] for one in result.examples.pop(reason)]}
        for reason, n in result.bad.most_common()
    }
    count, read = result.bad.total(), result.read.total()
    shown = [f"{why} {e['count']} ({', '.join(e['first'])})" for why, e in bad.items()]
    reasons = "; ".join(shown[:8])
    if len(shown) > 8:
        reasons += f"; and {len(shown) - 8} more reasons"
    if not count <= plan.max_bad_fraction * read:  # also where that is nan
        raise ValueError(
            f"{count} of {read} rows do not fit, more than max_bad_fraction="
            f"{plan.max_bad_fraction:g}: {reasons}; correct or remove them, or raise it"
        )
    if count:
        logging.warning("%d of %d rows do not fit: %s.", count, read, reasons)
    return bad


def select(plan: Plan, result: Converted) -> None:
    """Decides the fate of every record; a ValueError if splits share a prompt, or rows lack."""
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
        near = filters.near_duplicates([result.signatures[record] for record in left])
        _drop_repeated(index, NEAR_DUPLICATE, left, np.where(near < 0, left, left[near]))
    if selection.rows is not None:
        _select_sizes(selection.rows, index)
        return
    if selection.sample < 1.0:
        unused = index["sample"] >= np.uint64(int(selection.sample * 2.0**64))
        fates[(fates == OPEN) & unused] = SAMPLED_OUT
    held_out = index["holdout"] < np.uint64(int(selection.fraction_held_out * 2.0**64))
    fates[fates == OPEN] = np.where(home == OPEN, held_out.astype(np.int8), home)[fates == OPEN]


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
        prompts = index["prompt"][left]
        order = np.lexsort((left, prompts, index[purpose][left]))
        left, prompts = left[order], prompts[order]
        for records in np.split(left, np.flatnonzero(prompts[1:] != prompts[:-1]) + 1):
            if len(records) <= wanted:
                fates[records] = split
                wanted -= len(records)
        if wanted:
            raise ValueError(
                f"rows={rows[split]} for {name} cannot be met by complete prompts: {wanted} are "
                f"missing, with {len(left)} left to select from"
            )
    fates[fates == OPEN] = SAMPLED_OUT


def make_report(
    plan: Plan, result: Converted, bad: dict[str, dict[str, Any]], prompt_of: Callable[[int], str]
) -> dict[str, Any]:
    """The report as JSON, without digests of the records; a ValueError if none is for training."""
    index, fates = result.index, result.index["fate"]
    train, held_out = plan.schema.splits
    names = (*plan.schema.splits, *REASONS)
    numbers = {name: int((fates == fate).sum()) for fate, name in enumerate(names)}
    kept = {split: numbers.pop(split) for split in plan.schema.splits}
    rules = result.rules + Counter(numbers)
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
    for fate, reason in enumerate(REASONS, OVERLAP):
        for record in np.flatnonzero(fates == fate)[:EXAMPLES].tolist():
            before, original = [window(prompt_of(record))], int(index["original"][record])
            if original >= 0:
                before.append(f"as {place(plan, index[original])}: {window(prompt_of(original))}")
            example = {"where": place(plan, index[record]), "before": before, "after": None}
            result.examples.setdefault(reason, []).append(example)
    # `dropped`: by a rule about one row
    rows = {"read": read, "bad": result.bad.total(), "dropped": result.dropped}
    rows |= {"records": len(fates), "kept": kept}
    feedback, path = {}, plan.sources.files[0].path.with_name("account.json")
    if plan.dataset == "ultrafeedback" and path.is_file():  # of the round that wrote the rows
        names = ("name", "rows", "prompts", "answers", "judgements", "agreement")
        account = read_json(path, "collect the feedback again", names)
        verify(path.parent, [path.name], required="sealed" in account)
        feedback["feedback"] = {name: account[name] for name in names}
    return {
        "made_from": plan.identity(),
        "sealed": True,
        **feedback,
        "origin": plan.sources.origin,
        "splits_by": "file names" if plan.sources.files[0].split else "prompt_id",
        "rows": rows,
        "read_by_source": dict(sorted(result.read.items())),
        "skipped": dict(plan.sources.skipped),
        "rules": dict(rules.most_common()),
        "bad": bad,
        "examples": result.examples,
    }


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Makes a worker end with its parent, also by the keyboard; it would wait for tasks forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(
    function: Callable[[Item], Result], tasks: Sequence[Item], workers: int, title: str
) -> list[Result]:
    """The results of `function` in the order of the tasks; several workers pickle all of these."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        return list(tqdm(map(function, tasks), title, len(tasks)))
    # A forked child would inherit the threads' locks of JAX, TFDS and the progress bar.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        return list(tqdm(pool.map(function, tasks), title, len(tasks)))
