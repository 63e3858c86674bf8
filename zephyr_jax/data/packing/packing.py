"""Documents into rows (`zephyr_jax.types.Rows`), rows into batches: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_STEPS = 100  # train.epochs=0: as many epochs as make these


class Document(NamedTuple):
    """A dialogue or a preference pair of `T` tokens."""

    tokens: np.ndarray  # T int32
    positions: np.ndarray  # T int32
    branches: np.ndarray  # T uint8
    loss_mask: np.ndarray  # T bool
    id: int = 0  # of a preference pair
    uncut: int = 0  # the tokens of a dialogue before it was cut
    prompt_cut: bool = False
    answer_cut: bool = False
    equal: bool = False  # both answers of the pair are the same tokens
    prompt: int = 0  # of a labeled answer: a hash of its prompt
    answer: int = 0  # of a labeled answer: how many tokens it has


def row_dtype(seq_len: int, pairs: int) -> np.dtype:
    """One row as stored: the five arrays of `Rows`, and the ids of its pairs (0: none)."""
    arrays = [("tokens", "<i4"), ("segments", "<i4"), ("positions", "<i4")]
    arrays += [("branches", "u1"), ("loss_mask", "?")]
    fields = [(name, kind, (seq_len,)) for name, kind in arrays]
    return np.dtype([*fields, ("pair_ids", "<i8", (pairs,))])


def dialogue_document(
    ids: Sequence[int], targets: Sequence[int], max_length: int | None = None
) -> Document:
    """A dialogue cut to its first `max_length` tokens, and after its last target.

    Its first token is never a target: nothing predicts it. Without `max_length` it stays whole.
    """
    mask = np.array(targets[:max_length], bool)
    if max_length is not None:
        mask[:1] = False
        mask = mask[: int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0]
    n = len(mask)
    positions, branches = np.arange(n, dtype=np.int32), np.zeros(n, np.uint8)
    return Document(np.asarray(ids[:n], np.int32), positions, branches, mask, uncut=len(ids))


def cut_pair(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    max_length: int,
    max_prompt_length: int,
    bos: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Prompt and answers within the limits, cut as the published recipe cuts them.

    Where the prompt and the longer answer exceed `max_length`, the prompt keeps its last
    `max_prompt_length` tokens (with its BOS); where that is not enough, both answers keep their
    first `max_length - max_prompt_length`.
    """
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest > max_length and len(prompt) > max_prompt_length:
        head = prompt[: int(bos)]
        prompt = head + prompt[len(prompt) - max_prompt_length + len(head) :]
    if len(prompt) + longest > max_length:
        room = max_length - max_prompt_length
        chosen, rejected = chosen[:room], rejected[:room]
    return prompt, chosen, rejected


def pair_document(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], pair_id: int
) -> Document:
    """A preference pair as one document that holds the prompt once.

    The shared prefix is the prompt without its last token; each branch is a copy of that token, at
    its position and never a target, followed by the answer. So every answer token stands right
    after its predictor, and both branches continue the positions of the prefix.

    Example: prompt `[1, 7]`, answers `[8, 2]` and `[9, 2]`: tokens `1 | 7 8 2 | 7 9 2`, positions
    `0 | 1 2 3 | 1 2 3`, branches `0 | 1 1 1 | 2 2 2`, targets `0 | 0 1 1 | 0 1 1`.
    """
    if not prompt:
        raise ValueError("a preference pair needs a prompt of at least one token")
    n_shared = len(prompt) - 1
    n_chosen, n_rejected = 1 + len(chosen), 1 + len(rejected)
    branches = np.repeat(np.arange(3, dtype=np.uint8), (n_shared, n_chosen, n_rejected))
    mask = branches > 0
    mask[[n_shared, n_shared + n_chosen]] = False
    first, second = np.arange(n_shared + n_chosen), np.arange(n_shared, n_shared + n_rejected)
    tokens = np.asarray([*prompt, *chosen, prompt[-1], *rejected], np.int32)
    positions = np.concatenate([first, second]).astype(np.int32)
    return Document(tokens, positions, branches, mask, pair_id)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices, by best-fit decreasing: each length goes where it leaves least room.

    Ties keep their order. Example: lengths `[3, 5, 2, 4]` into 7 give `[[1, 2], [3, 0]]`.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit a row of {capacity}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some bin has room r; its lowest bit >= length is the best fit
    for i in order:
        fitting = rooms >> lengths[i]
        if fitting:
            room = lengths[i] + (fitting & -fitting).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(i)
        left = room - lengths[i]
        by_room.setdefault(left, []).append(target)
        rooms |= 1 << left
    return bins


def build_row(documents: Sequence[Document], seq_len: int, pairs: int) -> np.ndarray:
    """One row (a 0-d structured array of `row_dtype`) that holds these documents, then padding."""
    row = np.zeros((), row_dtype(seq_len, pairs))
    at = 0
    for k, document in enumerate(documents):
        here = slice(at, at + len(document.tokens))
        row["segments"][here] = k + 1
        for name in ("tokens", "positions", "branches", "loss_mask"):
            row[name][here] = getattr(document, name)
        if pairs:
            row["pair_ids"][k] = document.id
        at = here.stop
    return row


def stream_row(documents: Sequence[Document], skip: int, seq_len: int) -> np.ndarray:
    """One full row of documents end to end behind `skip` tokens: one segment, no first target."""
    row = np.zeros((), row_dtype(seq_len, 0))
    for name in ("tokens", "loss_mask"):
        row[name] = np.concatenate([getattr(d, name) for d in documents])[skip : skip + seq_len]
    row["segments"] = 1
    row["positions"] = np.arange(seq_len)
    row["loss_mask"][:1] = False
    return row


def row_arrays(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """The five arrays of `Rows`, `R T`, of rows as stored: four int32, then the bool loss mask."""
    names = ("tokens", "segments", "positions", "branches")
    return *(rows[name].astype(np.int32) for name in names), np.ascontiguousarray(rows["loss_mask"])


def cut_stream(
    lengths: Sequence[int] | np.ndarray, seq_len: int, seed: int
) -> tuple[list[list[int]], list[int]]:
    """Rows of documents end to end in a seeded order; how many tokens of its first each skips."""
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(lengths))
    ends = np.cumsum(np.asarray(lengths, np.int64)[order])
    starts = np.arange(int(ends[-1]) // seq_len if len(ends) else 0) * seq_len
    firsts = np.searchsorted(ends, starts, side="right")
    lasts = np.searchsorted(ends, starts + seq_len, side="left")
    before = np.concatenate([[0], ends])[firsts]
    rows = [order[i : j + 1].tolist() for i, j in zip(firsts, lasts, strict=True)]
    return rows, (starts - before).tolist()


def level_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch's batches of exactly `batch_size` indices, with nearly equal token totals.

    What does not fill a batch, by a seeded shuffle, becomes the last one. The others are ranked by
    length and cut into `batch_size` strata, of which every batch gets a random one each; a few
    exchanges within strata then level the totals.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    n_batches, left = divmod(len(order), batch_size)
    last, full = order[:left], order[left:]
    sizes = np.asarray(lengths, np.int64)
    strata = full[np.argsort(sizes[full], kind="stable")].reshape(batch_size, n_batches)
    dealt = rng.permuted(strata, axis=1).T  # n_batches, batch_size
    sizes = sizes[dealt]
    totals = sizes.sum(axis=1)
    for _ in range(8 * n_batches):  # exchanges between the largest and the smallest batch
        most, least = int(totals.argmax()), int(totals.argmin())
        gap = totals[most] - totals[least]
        moved = sizes[most] - sizes[least]
        at = int(np.abs(2 * moved - gap).argmin())
        if not 0 < moved[at] < gap:
            break
        for table in (dealt, sizes):
            table[[most, least], at] = table[[least, most], at]
        totals[most] -= moved[at]
        totals[least] += moved[at]
    return [sorted(map(int, batch)) for batch in (*dealt, last) if len(batch)]


def rows_of(lengths: Sequence[int], batch: Sequence[int], seq_len: int) -> list[list[int]]:
    """The rows of a batch, which are lists of the indices in it."""
    return [[batch[i] for i in row] for row in best_fit([lengths[i] for i in batch], seq_len)]


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `n`."""
    return -(-n // multiple) * multiple
