"""The second stage: which records go to which split. NumPy over the indexes of all chunks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from zephyr_jax.data.prepare.convert import INDEX, ConvertTask
from zephyr_jax.data.prepare.plan import Plan, Selection
from zephyr_jax.data.raw import near_duplicates

# What a record's code means, beside 0 for the training and 1 for the held-out split.
STRADDLING, DUPLICATE, NEAR_DUPLICATE, SAMPLED_OUT = 2, 3, 4, 5
REASONS = {
    STRADDLING: "straddling",
    DUPLICATE: "duplicate_prompt",
    NEAR_DUPLICATE: "near_duplicate_prompt",
    SAMPLED_OUT: "sampled_out",
}
_OPEN = -1


@dataclasses.dataclass(frozen=True)
class Decisions:
    """For N records in the order of the chunks: chunk, place in it, size in bytes, and code.

    `twins` has for a dropped duplicate the record that it repeats, else -1.
    """

    chunk: np.ndarray  # N int64
    place: np.ndarray  # N int64
    index: np.ndarray  # N INDEX
    codes: np.ndarray  # N int8
    twins: np.ndarray  # N int64


def decide(plan: Plan, tasks: list[ConvertTask]) -> Decisions:
    """The fate of every staged record; a function of the records alone.

    Raises:
        ValueError: published splits share a prompt, or there are fewer records than wanted.
    """
    parts = [np.load(task.file(".npy")) for task in tasks]
    index = np.concatenate([np.empty(0, INDEX), *parts])
    sizes = [len(part) for part in parts]
    chunk = np.repeat(np.arange(len(parts)), sizes)
    place = np.arange(len(index)) - np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
    made = Decisions(
        chunk, place, index, np.full(len(index), _OPEN, np.int8), np.full(len(index), -1)
    )
    homes = np.array(
        [_home(plan, plan.sources.files[task.source].split) for task in tasks], np.int8
    )
    published = homes[chunk] if len(homes) else np.empty(0, np.int8)
    _mark_straddling(plan, tasks, made, published)
    if plan.selection.duplicates != "keep":
        _mark_duplicates(made)
    if plan.selection.duplicates == "near":
        _mark_near_duplicates(plan.selection, tasks, made)
    _select(plan.selection, made, published)
    return made


def _home(plan: Plan, split: str | None) -> int:
    """The code of a published split, or open."""
    return _OPEN if split is None else plan.schema.splits.index(split)


def _mark_straddling(
    plan: Plan, tasks: list[ConvertTask], made: Decisions, published: np.ndarray
) -> None:
    prompts = made.index["prompt"]
    straddling = (published == 0) & np.isin(prompts, prompts[published == 1])
    if straddling.any() and not plan.selection.drop_straddling:
        train, held_out = plan.schema.splits
        first = where(plan, tasks, made, int(np.flatnonzero(straddling)[0]))
        raise ValueError(
            f"{first}: this prompt of {train} is in {held_out} too, as are those of "
            f"{int(straddling.sum()) - 1} more rows, so evaluation would see training text; "
            f"--drop_straddling leaves such rows out of {train}"
        )
    made.codes[straddling] = STRADDLING


def _mark_duplicates(made: Decisions) -> None:
    """Of rows with one prompt the first stays; records of one row share its prompt and its fate."""
    left = np.flatnonzero(made.codes == _OPEN)
    _, first, inverse = np.unique(
        made.index["prompt"][left], return_index=True, return_inverse=True
    )
    twins = left[first[inverse]]
    rows = made.chunk << 32 | made.index["row"]
    dropped = rows[left] != rows[twins]
    made.codes[left[dropped]] = DUPLICATE
    made.twins[left[dropped]] = twins[dropped]


def _mark_near_duplicates(selection: Selection, tasks: list[ConvertTask], made: Decisions) -> None:
    left = np.flatnonzero(made.codes == _OPEN)
    rows = made.chunk[left] << 32 | made.index["row"][left]
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    signatures = np.concatenate([np.load(task.file(".signatures.npy")) for task in tasks])
    near = near_duplicates.near_duplicates(signatures[left[first]], selection.near_threshold)
    found = near[inverse]
    dropped = found >= 0
    made.codes[left[dropped]] = NEAR_DUPLICATE
    made.twins[left[dropped]] = left[first[found[dropped]]]


def _select(selection: Selection, made: Decisions, published: np.ndarray) -> None:
    """Gives what is still open to the splits."""
    codes, index = made.codes, made.index
    left = codes == _OPEN
    if selection.rows is None:
        # The largest share that is not all stays below 2**64; all needs no comparison.
        sampled = selection.sample >= 1.0 or index["sample"] < np.uint64(
            int(selection.sample * 2.0**64)
        )
        held_out = index["holdout"] < np.uint64(int(selection.holdout * 2.0**64))
        home = np.where(published == _OPEN, held_out.astype(np.int8), published)
        codes[left] = np.where(sampled, home, SAMPLED_OUT)[left]
        return
    n_train, n_held_out = selection.rows
    open_held_out = left & (published != 0)
    taken = _take(index, open_held_out, "holdout", n_held_out, "the held-out split")
    codes[taken] = 1
    taken = _take(index, left & (published != 1) & ~taken, "sample", n_train, "training")
    codes[taken] = 0
    codes[codes == _OPEN] = SAMPLED_OUT


def _take(
    index: np.ndarray, candidates: np.ndarray, lot: str, wanted: int, said: str
) -> np.ndarray:
    """Exactly `wanted` of the candidates, whole prompts by lot: a mask over all records."""
    if candidates.sum() < wanted:
        raise ValueError(
            f"rows wants {wanted} records for {said}, but only {int(candidates.sum())} are left"
        )
    at = np.flatnonzero(candidates)
    order = at[np.lexsort((at, index["prompt"][at], index[lot][at]))]
    prompts = index["prompt"][order]
    begins = np.flatnonzero(np.r_[True, prompts[1:] != prompts[:-1]])[: len(order)]
    taken, room = np.zeros(len(index), bool), wanted
    for start, stop in zip(begins, np.r_[begins[1:], len(order)], strict=True):
        if not room:
            break
        if stop - start <= room:
            taken[order[start:stop]] = True
            room -= stop - start
    if room:
        raise ValueError(
            f"rows={wanted} for {said} cannot be met by whole prompts: {room} short; give another "
            f"number"
        )
    return taken


def where(plan: Plan, tasks: list[ConvertTask], made: Decisions, record: int) -> str:
    """Source and row of a record, as in `train_3.jsonl:17`."""
    return place(plan, tasks, int(made.chunk[record]), int(made.index["row"][record]))


def place(plan: Plan, tasks: list[ConvertTask], chunk: int, line: int) -> str:
    """Source and line in it, from a chunk and the line in that."""
    source = tasks[chunk].source
    earlier = (task for task in tasks[:chunk] if task.source == source)
    before = sum(json.loads(task.file(".json").read_text())["lines"] for task in earlier)
    return f"{plan.sources.files[source].name}:{before + line}"
