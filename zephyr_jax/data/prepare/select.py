"""Which records go to which split: NumPy over the index of all chunks, in memory."""

from __future__ import annotations

import numpy as np

from zephyr_jax.data.prepare.convert import OPEN, Converted, place
from zephyr_jax.data.prepare.plan import Plan, Selection
from zephyr_jax.data.raw import near_duplicates

# The fate of a record: 0 for the training split, 1 for the held-out split, or why it is in neither.
OVERLAP, DUPLICATE, NEAR_DUPLICATE, SAMPLED_OUT = 2, 3, 4, 5
REASONS = {
    OVERLAP: "train_test_overlap",
    DUPLICATE: "duplicate_prompt",
    NEAR_DUPLICATE: "near_duplicate_prompt",
    SAMPLED_OUT: "sampled_out",
}


def select(plan: Plan, result: Converted) -> None:
    """Decides the fate of every record, in the merged index.

    Raises:
        ValueError: published splits share a prompt, or there are fewer records than wanted.
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
    rows = index["chunk"].astype(np.int64) << 32 | index["line"]

    def drop_repeated(reason: int, left: np.ndarray, kept: np.ndarray) -> None:
        """Drops the records whose kept record is of another row; records of a row stay together."""
        dropped = rows[left] != rows[kept]
        fates[left[dropped]] = reason
        index["original"][left[dropped]] = kept[dropped]

    if selection.duplicates != "keep":
        left = np.flatnonzero(fates == OPEN)
        _, first, of = np.unique(index["prompt"][left], return_index=True, return_inverse=True)
        drop_repeated(DUPLICATE, left, left[first[of]])
    if selection.duplicates == "near":
        left = np.flatnonzero(fates == OPEN)
        _, first, of = np.unique(rows[left], return_index=True, return_inverse=True)
        signatures = result.signatures[left[first]]
        near = near_duplicates.near_duplicates(signatures, selection.near_threshold)
        kept = np.where(near < 0, np.arange(len(near)), near)
        drop_repeated(NEAR_DUPLICATE, left, left[first[kept[of]]])
    if selection.rows is None:
        left = fates == OPEN
        fates[left] = _by_fraction(selection, index)[left]
    else:
        _by_size(selection.rows, index)


def _by_fraction(selection: Selection, index: np.ndarray) -> np.ndarray:
    held_out = index["holdout"] < np.uint64(int(selection.holdout * 2.0**64))
    split = np.where(index["home"] == OPEN, held_out.astype(np.int8), index["home"])
    if selection.sample == 1.0:  # its bound would not fit in 64 bits
        return split
    return np.where(
        index["sample"] < np.uint64(int(selection.sample * 2.0**64)), split, SAMPLED_OUT
    )


def _by_size(rows: tuple[int, int], index: np.ndarray) -> None:
    """Exactly the wanted numbers of records, in a random order of complete prompts."""
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
        starts = np.flatnonzero(np.r_[True, prompts[1:] != prompts[:-1]][: len(left)])
        for records in np.split(left, starts[1:]):
            if not wanted:
                break
            if len(records) <= wanted:
                fates[records] = split
                wanted -= len(records)
        if wanted:
            raise ValueError(
                f"rows={rows[split]} for {name} cannot be met by complete prompts: {wanted} short; "
                f"give another number"
            )
    fates[fates == OPEN] = SAMPLED_OUT
