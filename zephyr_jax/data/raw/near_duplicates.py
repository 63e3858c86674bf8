"""Nearly equal prompts: MinHash signatures, and the rows that repeat an earlier row.

A prompt is the set of its runs of five words (shingles); two prompts are similar by the share of
shingles that both have (Jaccard). The share of equal entries of two MinHash signatures (Broder
1997) estimates it, with a standard error of at most 1/16 for 64 entries. Only rows that agree in
all entries of some band are compared (Leskovec et al., Mining of Massive Datasets, 3.4).
"""

from __future__ import annotations

from collections import defaultdict
from importlib import metadata

import numpy as np
from jaxtyping import Int64, UInt32
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from zephyr_jax.data.raw.filters import words

HASHES = 64
SHINGLE = 5  # words
RECALL = 0.999  # of pairs whose similarity is exactly the threshold; more of those above it
# Signatures of one version of rensa are the same on every machine, so reports name it.
METHOD = f"rensa {metadata.version('rensa')}, {HASHES} hashes of {SHINGLE} words"
_BUCKET = 128  # rows at most that a bucket offers for comparison


def signature(prompt: str) -> UInt32[np.ndarray, 64]:
    """The MinHash signature of a prompt's shingles.

    A prompt of fewer than five words is one shingle; if it has no word ("???", ""), the text
    itself without surrounding blanks.
    """
    text = words(prompt) or [prompt.strip()]
    sketch = RMinHash(num_perm=HASHES, seed=1)
    sketch.update([" ".join(text[at : at + SHINGLE]) for at in range(max(1, len(text) - 4))])
    return np.array(sketch.digest(), np.uint32)


def bands_for(threshold: float) -> tuple[int, int]:
    """The number of bands and their width in entries that find pairs at a threshold.

    A pair of similarity s agrees in a band of r entries with probability s^r, so b bands miss it
    with (1 - s^r)^b. Returned are the widest bands that miss at most 1 - RECALL; below a threshold
    of about 0.11 even 64 bands of one entry miss more.

    >>> bands_for(0.8), bands_for(0.9), bands_for(0.5)
    ((16, 4), (10, 6), (32, 2))
    """
    for width in range(HASHES, 1, -1):
        bands = HASHES // width
        if (1 - threshold**width) ** bands <= 1 - RECALL:
            return bands, width
    return HASHES, 1


def near_duplicates(
    signatures: UInt32[np.ndarray, "N 64"], threshold: float
) -> Int64[np.ndarray, " N"]:
    """For each row the first kept row before it that it nearly equals, or -1 if it stays.

    Rows are decided in their order: a row is dropped if the share of equal entries with a kept
    row is at least the threshold; a row that is similar to dropped rows only stays. A pair is
    missed with the probability of `bands_for`, and where more than 128 kept rows share each of
    its common bands, as the prompts of one template may.

    Raises:
        ValueError: for a threshold that is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1 (0.8 is usual)")
    bands, width = bands_for(threshold)
    factors = np.random.default_rng(0).integers(1, 1 << 63, width, np.uint64) | np.uint64(1)
    buckets = np.empty((len(signatures), bands), np.int32)
    shared = np.zeros(len(signatures), np.bool_)
    for band in range(bands):
        entries = signatures[:, band * width : (band + 1) * width]
        keys = (entries * factors).sum(axis=1, dtype=np.uint64)  # equal for equal entries
        _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        buckets[:, band] = inverse
        shared |= sizes[inverse] > 1
    repeated = np.full(len(signatures), -1, np.int64)
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # rows by band and bucket
    for row in np.flatnonzero(shared).tolist():
        own = list(enumerate(buckets[row].tolist()))
        candidates = sorted({candidate for bucket in own for candidate in kept[bucket]})
        equal = signatures[candidates] == signatures[row]
        similar = np.count_nonzero(equal, axis=1) >= threshold * HASHES
        if similar.any():
            repeated[row] = candidates[int(np.argmax(similar))]
            continue
        for bucket in own:
            if len(kept[bucket]) < _BUCKET:
                kept[bucket].append(row)
    return repeated
