"""Which records go to which split: NumPy over the index of all chunks, in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zephyr_jax.data.prepare.plan import Selection
from zephyr_jax.data.raw import near_duplicates

# The fate of a record: 0 for the training split, 1 for the held-out split, or why it is in neither.
OVERLAP, DUPLICATE, NEAR_DUPLICATE, SAMPLED_OUT = 2, 3, 4, 5
REASONS = {
    OVERLAP: "train_test_overlap",
    DUPLICATE: "duplicate_prompt",
    NEAR_DUPLICATE: "near_duplicate_prompt",
    SAMPLED_OUT: "sampled_out",
}
OPEN = -1


def select(
    selection: Selection,
    index: np.ndarray,
    published: np.ndarray,
    signatures: np.ndarray,
    where: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray]:
    """The fate of every record, and the record that a dropped duplicate repeats, else -1.

    Args:
        selection: what to select.
        index: [N] of `convert.INDEX`.
        published: int8 [N], the split of the record's file, or OPEN.
        signatures: [N, ...], the MinHash of every prompt; read for near duplicates only.
        where: the place of a record, for messages.

    Raises:
        ValueError: published splits share a prompt, or there are fewer records than wanted.
    """
    fates = np.full(len(index), OPEN, np.int8)
    originals = np.full(len(index), -1)
    overlap = (published == 0) & np.isin(index["prompt"], index["prompt"][published == 1])
    if overlap.any() and not selection.drop_overlap:
        raise ValueError(
            f"{where(int(np.flatnonzero(overlap)[0]))}: this prompt of the training split is in "
            f"the held-out split too, as are those of {int(overlap.sum()) - 1} more rows, so "
            f"evaluation would see training text; --drop_overlap leaves such rows out of training"
        )
    fates[overlap] = OVERLAP
    rows = index["chunk"].astype(np.int64) << 32 | index["line"]

    def drop_repeated(reason: int, left: np.ndarray, kept: np.ndarray) -> None:
        """Drops the records whose kept record is of another row; records of a row stay together."""
        dropped = rows[left] != rows[kept]
        fates[left[dropped]] = reason
        originals[left[dropped]] = kept[dropped]

    if selection.duplicates != "keep":
        left = np.flatnonzero(fates == OPEN)
        _, first, of = np.unique(index["prompt"][left], return_index=True, return_inverse=True)
        drop_repeated(DUPLICATE, left, left[first[of]])
    if selection.duplicates == "near":
        left = np.flatnonzero(fates == OPEN)
        _, first, of = np.unique(rows[left], return_index=True, return_inverse=True)
        near = near_duplicates.near_duplicates(signatures[left[first]], selection.near_threshold)
        kept = np.where(near < 0, np.arange(len(near)), near)
        drop_repeated(NEAR_DUPLICATE, left, left[first[kept[of]]])
    left = fates == OPEN
    if selection.rows is None:
        fates[left] = _by_fraction(selection, index, published)[left]
    else:
        _by_size(selection.rows, index, published, fates)
    return fates, originals


def _by_fraction(selection: Selection, index: np.ndarray, published: np.ndarray) -> np.ndarray:
    held_out = index["holdout"] < np.uint64(int(selection.holdout * 2.0**64))
    split = np.where(published == OPEN, held_out.astype(np.int8), published)
    if selection.sample == 1.0:  # its bound would not fit in 64 bits
        return split
    return np.where(
        index["sample"] < np.uint64(int(selection.sample * 2.0**64)), split, SAMPLED_OUT
    )


def _by_size(
    rows: tuple[int, int], index: np.ndarray, published: np.ndarray, fates: np.ndarray
) -> None:
    """Exactly the wanted numbers of records, in a random order of complete prompts."""
    for split, purpose, name in ((1, "holdout", "the held-out split"), (0, "sample", "training")):
        left = np.flatnonzero((fates == OPEN) & (published != 1 - split))
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
