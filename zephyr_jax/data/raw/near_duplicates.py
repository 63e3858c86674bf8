"""Prompts that are nearly equal: MinHash signatures, and the rows that repeat an earlier one.

A prompt is the set of its runs of five words; two prompts are alike by the share of their runs
that both have (Jaccard). 64 hash functions each keep the smallest hash of the set (Broder 1997),
and the share of equal entries of two signatures estimates that likeness; its standard error is
at most 1/16. Candidates come from banding (Leskovec et al., Mining of Massive Datasets, 3.4):
only rows that agree in all entries of some band are compared.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
from jaxtyping import Int64, UInt32

from zephyr_jax.data.raw.words import Words

PERMUTATIONS = 64
SHINGLE = 5  # words
SEED = "zephyr_jax near duplicates 1"  # another one makes other signatures; never mix them
RECALL = 0.999  # of pairs whose likeness is exactly the threshold; more of those above it
_BLOCK = 256  # rows decided together
_KEPT = 128  # rows at most that a bucket offers for comparison
_SLICE = 1 << 16  # rows or pairs of signatures in memory at once


def _constants(purpose: str, count: int) -> np.ndarray:
    """Random uint64 [count] that are the same on every machine and under every NumPy."""
    drawn = hashlib.shake_256(f"{SEED}/{purpose}".encode()).digest(8 * count)
    return np.frombuffer(drawn, "<u8").astype(np.uint64)


_FACTORS = _constants("factors", PERMUTATIONS)[:, None] | np.uint64(1)
_TERMS = _constants("terms", PERMUTATIONS)[:, None]
_COLUMNS = _constants("columns", PERMUTATIONS) | np.uint64(1)


def signature(prompt: str) -> UInt32[np.ndarray, " 64"]:
    """The MinHash of a prompt's runs of five words, the same on every machine.

    A prompt of fewer words is one run; of one without a word ("???", "") the text itself,
    without the blanks around it, takes the place of the run.
    """
    text = Words([prompt])
    if len(text.codes):
        runs = text.runs(min(SHINGLE, len(text.codes)))
    else:
        runs = np.array([zlib.crc32(prompt.strip().encode("utf-8", "surrogatepass"))], np.uint64)
    runs = _mixed(runs)
    smallest = np.full(PERMUTATIONS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(runs), 4096):
        hashed = runs[start : start + 4096] * _FACTORS + _TERMS
        np.minimum(smallest, hashed.min(axis=1), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each uint64 with its bits well mixed, by the finalizer of MurmurHash3."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def bands_for(threshold: float) -> tuple[int, int]:
    """How many bands of how many entries find a pair at the threshold with the wanted recall.

    A pair of likeness s agrees in a band of r entries with probability s^r, so that b bands miss
    it with (1 - s^r)^b. Of the widest bands that miss at most 1 - RECALL (0.001): 16 of 4 at 0.8,
    10 of 6 at 0.9. Below about 0.11 even 64 bands of one entry miss more.

    >>> bands_for(0.8), bands_for(0.9), bands_for(0.5)
    ((16, 4), (10, 6), (32, 2))
    """
    for rows in range(PERMUTATIONS, 1, -1):
        count = PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= 1 - RECALL:
            return count, rows
    return PERMUTATIONS, 1


def near_duplicates(
    signatures: UInt32[np.ndarray, "N 64"], threshold: float
) -> Int64[np.ndarray, " N"]:
    """For each row -1 if it stays, or the first kept row before it that it nearly equals.

    Rows are decided in their order, each by the rows kept before it: it goes if the share of
    equal entries is at least the threshold. A row that is only like dropped ones stays. Beside
    the misses of `bands_for`, a pair may be missed if its only common bands are ones that more
    than 128 kept rows have in common, as the prompts of one template do; rows with equal
    signatures are never missed. The time is linear in N. Beside the signatures, which may be a
    memory map, it takes about 8 bytes a row and band (0.3 GB for 1.5 million rows at 0.8).

    Raises:
        ValueError: for a threshold that is not above 0 and at most 1, and for other arrays.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1 (0.8 is usual)")
    if signatures.ndim != 2 or signatures.shape[1] != PERMUTATIONS or signatures.dtype != np.uint32:
        raise ValueError(
            f"signatures are {signatures.dtype} {signatures.shape}, not uint32 [N {PERMUTATIONS}] "
            "as `signature` gives them"
        )
    needed = next(n for n in range(PERMUTATIONS + 1) if n / PERMUTATIONS >= threshold)
    first = _first_equal(signatures)
    rows = np.flatnonzero(first == np.arange(len(first)))
    verdict = np.full(len(first), -1, np.int64)
    verdict[rows] = _near(signatures, rows, needed, *bands_for(threshold))
    # What equals a dropped row is like the same kept row as that one.
    firsts = verdict[first]
    return np.where((firsts < 0) & (first != np.arange(len(first))), first, firsts)


def _keys(signatures: np.ndarray, rows: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """A uint64 for the entries start to stop of the rows (None: all)."""
    total = len(signatures) if rows is None else len(rows)
    keys = np.zeros(total, np.uint64)
    for at in range(0, total, _SLICE):
        part = slice(at, at + _SLICE)
        entries = signatures[part if rows is None else rows[part], start:stop]
        keys[part] = (entries * _COLUMNS[start:stop]).sum(axis=1, dtype=np.uint64)
    return _mixed(keys)


def _first_equal(signatures: np.ndarray) -> np.ndarray:
    """int64 [N]: the first row with the same signature, itself if it is the first."""
    keys = _keys(signatures, None, 0, PERMUTATIONS)
    order = np.argsort(keys, kind="stable")
    begins = np.ones(len(keys), np.bool_)
    begins[1:] = keys[order[1:]] != keys[order[:-1]]
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    again = np.flatnonzero(first != np.arange(len(keys)))
    for at in range(0, len(again), _SLICE):
        rows = again[at : at + _SLICE]
        other = rows[(signatures[rows] != signatures[first[rows]]).any(axis=1)]
        first[other] = other  # keys that are equal by accident
    return first


def _near(
    signatures: np.ndarray, rows: np.ndarray, needed: int, bands: int, width: int
) -> np.ndarray:
    """int64 [rows]: -1, or the first kept one of the rows that has `needed` entries in common."""
    verdict = np.full(len(rows), -1, np.int64)
    buckets, sizes = _buckets(signatures, rows, bands, width)
    kept = _Kept(sizes)
    linked = np.flatnonzero((buckets >= 0).any(axis=1))
    for at in range(0, len(linked), _BLOCK):
        block = linked[at : at + _BLOCK]
        own = signatures[rows[block]]
        verdict[block] = _earlier(signatures, own, kept.candidates(buckets[block]), needed)
        left = np.flatnonzero(verdict[block] < 0)
        like = _likes(own[left], needed)
        stays = np.ones(len(left), np.bool_)
        for index in np.flatnonzero(like.any(axis=1)).tolist():
            models = np.flatnonzero(like[index] & stays)
            if len(models):
                stays[index] = False
                verdict[block[left[index]]] = rows[block[left[models[0]]]]
        staying = block[left[stays]]
        kept.add(buckets[staying], rows[staying])
    return verdict


def _buckets(
    signatures: np.ndarray, rows: np.ndarray, bands: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each row in each band, int32 [rows bands], and the sizes of the buckets.

    A bucket holds rows that agree in a whole band; -1 stands for a row alone. Buckets are numbered
    through all bands.
    """
    buckets = np.full((len(rows), bands), -1, np.int32)
    sizes: list[np.ndarray] = []
    total = 0
    for band in range(bands):
        keys = _keys(signatures, rows, band * width, (band + 1) * width)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
        counts = np.diff(np.r_[begins, len(keys)])
        numbers = np.where(counts > 1, total + np.cumsum(counts > 1) - 1, -1)
        buckets[order, band] = np.repeat(numbers, counts)
        sizes.append(counts[counts > 1])
        total += len(sizes[-1])
    return buckets, np.concatenate(sizes)


class _Kept:
    """The first kept rows of each bucket, at most `_KEPT`, in one array."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.room = np.minimum(sizes, _KEPT)
        self.begins = np.cumsum(self.room) - self.room
        self.counts = np.zeros_like(self.room)
        self.rows = np.empty(int(self.room.sum()), np.int32)

    def add(self, buckets: np.ndarray, rows: np.ndarray) -> None:
        """Put rows [n], in their order, into their buckets [n bands] as far as there is room."""
        flat = buckets.ravel()
        order = np.argsort(flat, kind="stable")
        order = order[flat[order] >= 0]
        names, starts, counts = np.unique(flat[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(starts, counts)
        place = np.repeat(self.counts[names], counts) + rank
        fits = place < np.repeat(self.room[names], counts)
        target = np.repeat(self.begins[names], counts) + place
        self.rows[target[fits]] = rows[order[fits] // buckets.shape[1]]
        self.counts[names] = np.minimum(self.counts[names] + counts, self.room[names])

    def candidates(self, buckets: np.ndarray) -> np.ndarray:
        """int64 [pairs 2], sorted: (index into the block, kept row) that share a bucket."""
        block, bands = np.nonzero(buckets >= 0)
        named = buckets[block, bands]
        counts = self.counts[named]
        total = int(counts.sum())
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        found = self.rows[np.repeat(self.begins[named], counts) + within].astype(np.int64)
        packed = np.unique((np.repeat(block, counts) << 32) | found)
        return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)


def _earlier(signatures: np.ndarray, own: np.ndarray, pairs: np.ndarray, needed: int) -> np.ndarray:
    """int64 [block]: the first candidate row with `needed` entries in common, else -1."""
    none = np.iinfo(np.int64).max
    first = np.full(len(own), none)
    for at in range(0, len(pairs), _SLICE):
        index, row = pairs[at : at + _SLICE].T
        near = np.count_nonzero(own[index] == signatures[row], axis=1) >= needed
        np.minimum.at(first, index[near], row[near])
    return np.where(first == none, -1, first)


def _likes(own: np.ndarray, needed: int) -> np.ndarray:
    """Bool [n n]: whether row i has `needed` entries in common with the earlier row j."""
    equal = np.zeros((len(own), len(own)), np.uint8)
    for column in own.T:
        equal += column[:, None] == column[None, :]
    return np.tril(equal >= needed, -1)
