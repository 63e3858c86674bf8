"""Which documents go into which row of which batch. Plans number them as they were tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Rendering


class Usable(NamedTuple):
    """The documents of a split that go into rows, and what was counted on the way."""

    indices: np.ndarray  # N int64, a document taken twice in it twice
    counts: dict[str, int]
    table: np.ndarray  # N of `documents.DOCUMENT`


class SplitPlan(NamedTuple):
    """The documents of every row of a split, and for a stream how much of the first to skip."""

    rows: list[list[int]]
    skips: list[int]  # empty where documents are whole
    others: list[list[int]]  # the documents whose answers labeled ones are compared with


def usable_documents(
    rendering: Rendering, seq_len: int, table: np.ndarray, times: np.ndarray, *, training: bool
) -> Usable:
    """The documents that can be used and fit a row; of pairs that occur again the first.

    `times` is how often each row of `table`, `M` of DOCUMENT, is taken. Pairs whose answers are the
    same tokens teach nothing: training drops them, evaluation has them as ties.
    """
    lengths = kept = table["length"]
    counts = {"read": len(table)}
    if rendering.pairs:
        first = np.zeros(len(table), bool)
        first[np.unique(table["id"], return_index=True)[1]] = True
        fits = first & (lengths <= seq_len)
        equal = fits & table["equal"]
        kept = np.where(fits & ~(equal & training), lengths, 0)
        counts |= {
            "prompts_cut": int(table["prompt_cut"][first].sum()),
            "answers_cut": int(table["answer_cut"][first].sum()),
            "dropped_too_long": int((first & ~fits).sum()),
            "dropped_equal_after_cut" if training else "equal_after_cut": int(equal.sum()),
            "dropped_duplicate": int((~first).sum()),
        }
    elif rendering.max_length is not None:
        over = np.maximum(table["uncut"] - rendering.max_length, 0)
        counts |= {
            "truncated": int((over > 0).sum()),
            "tokens_cut": int(over.sum()),
            "dropped_no_target": int((kept == 0).sum()),
        }
    indices = np.repeat(np.arange(len(table)), np.where(kept > 0, times, 0))
    if rendering.labeled:
        good = table["id"][indices] > 0
        counts |= {"desirable": int(good.sum()), "undesirable": int((~good).sum())}
    return Usable(indices, counts, table[indices])


def plan_rows(
    config: RunConfig, usable: dict[str, Usable]
) -> tuple[dict[str, Any], dict[str, SplitPlan]]:
    """The manifest's fields and a SplitPlan by split; a ValueError if a stream fills no row."""
    seq_len = config.data.seq_len
    fields, plans = {"seq_len": seq_len, "pairs_per_row": 0}, {}
    for split, part in usable.items():
        skips, other, lengths = [], np.arange(0), part.table["length"]
        if config.dpo:
            batch_fields, rows, other = _plan_batches(config, part, split)
            fields |= batch_fields
        elif config.data.packing == "best_fit":
            rows = packing.best_fit(lengths.tolist(), seq_len)
        else:
            rows, skips = packing.cut_stream(lengths, seq_len, config.seed)
            n_tokens = int(lengths.sum())
            if not rows:
                raise ValueError(
                    f"the {n_tokens} tokens of the {split} split fill no row of data.seq_len="
                    f"{seq_len}, which data.packing=concat needs; use best_fit"
                )
            part.counts["tokens_left_over"] = n_tokens - len(rows) * seq_len
        others = [part.indices[other[row]].tolist() for row in rows] if len(other) else []
        plans[split] = SplitPlan([part.indices[row].tolist() for row in rows], skips, others)
    if config.dpo:
        fields["pairs_per_row"] = max(len(row) for plan in plans.values() for row in plan.rows)
    return fields, plans


def _plan_batches(
    config: RunConfig, part: Usable, split: str
) -> tuple[dict[str, Any], list[list[int]], np.ndarray]:
    """The manifest's fields, the rows of every epoch's batches, all of R rows, and `mismatched`.

    What is held out is one batch. Labeled answers have the same batches in every epoch, in an
    order of its own, so that the other answers are the same too.
    """
    dpo, seed, lengths, other = config.dpo, config.seed, part.table["length"], np.arange(0)
    epochs, sizes = [[[*range(len(lengths))]]], lengths.tolist()
    if split == "train":
        size, last = config.train.batch_size, config.train.max_steps
        per_epoch = -(-len(sizes) // size)
        number = config.train.epochs or -(-packing.LEAST_STEPS // per_epoch)
        reached = -(-last // per_epoch) or number
        if number > 10 * reached:  # all of them are packed, so that runs of any length share them
            why = f"train.max_steps={last} ends the run in epoch {reached} of {number}"
            logging.warning("%s: --config.train.epochs=%d packs no more than that", why, reached)
        epochs = [packing.level_batches(sizes, size, seed, epoch) for epoch in range(number)]
    if dpo and dpo.labeled:
        first = epochs[0]
        for epoch in range(1, len(epochs)):
            order = np.random.default_rng([seed, epoch]).permutation(len(first))
            epochs[epoch] = [first[i] for i in order]
        other = mismatched(first, part.table["prompt"])
        own = part.table["answer"]  # is there twice; the second time, that of `other` replaces it
        rooms = dpo.max_length - (lengths - 2 * own - 1)  # behind the prompt
        sizes = (lengths - own + np.minimum(own[other], rooms)).tolist()
    batches = [packing.rows_of(sizes, b, config.data.seq_len) for epoch in epochs for b in epoch]
    n_rows = max(map(len, batches))
    fields = {"rows_per_batch": n_rows, "steps_per_epoch": len(epochs[0])}
    rows = [row for batch in batches for row in batch + [[]] * (n_rows - len(batch))]
    return fields if split == "train" else {}, rows, other


def mismatched(batches: Sequence[Sequence[int]], prompts: np.ndarray) -> np.ndarray:
    """For each example, `N`, that of its batch whose answer its prompt is also scored with.

    A rotation in the order of `prompts`, `N` hashes, as TRL rotates, by as many as the most
    frequent prompt has: no answer is to the same prompt unless that has more than half of the
    batch. A batch of one takes an answer of the first batch.
    """
    other = np.zeros(len(prompts), np.int64)
    for batch in map(np.asarray, batches):
        order = batch[np.argsort(prompts[batch], kind="stable")]
        most = np.unique(prompts[batch], return_counts=True)[1].max()
        other[order] = np.roll(order, max(1, min(most, len(batch) // 2)))
        if len(batch) == 1:
            other[batch] = batches[0][0]
    return other
