"""Which document goes into which row: plans over the lengths of all documents, and their counts.

A plan numbers documents as they were tokenized; one that is taken twice is in it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Rendering


class SplitPlan(NamedTuple):
    """The rows of one split: their documents, for a stream also what to skip of the first."""

    rows: list[list[int]]
    skips: list[int] | None
    documents: int
    counts: dict[str, int]


class Usable(NamedTuple):
    """The documents of a split that go into rows, their lengths there, and what was counted."""

    indices: np.ndarray  # N int64, a document taken twice in it twice
    lengths: np.ndarray  # N int64
    counts: dict[str, int]
    dealt_by: np.ndarray | None = None  # N int64: lengths of pairs whose prompt is shared


def usable_dialogues(rendering: Rendering, table: np.ndarray, times: np.ndarray) -> Usable:
    """The dialogues with something to learn from; of a stream all.

    Args:
        rendering: what they were tokenized by.
        table: what was tokenized, `M` rows of `tokenized.DOCUMENT`.
        times: how often each is taken, `M`.
    """
    seq_len, kept = rendering.seq_len, table["parts"][:, 0].astype(np.int64)
    counts = {"read": len(table)}
    if rendering.packing == "best_fit":
        over = np.maximum(table["whole"].astype(np.int64) - seq_len, 0)
        counts |= {
            "truncated": int((over > 0).sum()),
            "tokens_cut": int(over.sum()),
            "dropped_no_target": int((kept == 0).sum()),
        }
    indices = np.repeat(np.arange(len(table)), np.where(kept > 0, times, 0))
    return Usable(indices, kept[indices], counts)


def usable_pairs(rendering: Rendering, table: np.ndarray, times: np.ndarray) -> Usable:
    """The pairs that fit a row, the first of those that are equal; arguments as above."""
    _, firsts = np.unique(table["id"], return_index=True)
    first = np.zeros(len(table), bool)
    first[firsts] = True
    assert rendering.dpo is not None
    # The prompt's last token begins both branches; without a trunk all of the prompt does.
    shared = table["parts"].sum(axis=1, dtype=np.int64) + 1
    lengths = shared if rendering.dpo.share_prompt else shared - 1 + table["parts"][:, 0]
    fits = lengths <= rendering.seq_len
    counts = {
        "read": len(table),
        "prompts_cut": int(((table["cut"] & 1) > 0)[first].sum()),
        "answers_cut": int(((table["cut"] & 2) > 0)[first].sum()),
        "dropped_too_long": int((first & ~fits).sum()),
        "dropped_duplicate": int((~first).sum()),
    }
    indices = np.repeat(np.arange(len(table)), np.where(first & fits, times, 0))
    return Usable(indices, lengths[indices], counts, shared[indices])


def plan_dialogues(config: RunConfig, usable: dict[str, Usable]) -> tuple[dict[str, Any], dict]:
    """The manifest's fields and a SplitPlan by split, best-fit or as a stream."""
    seq_len, plans = config.data.seq_len, {}
    for split, (indices, lengths, counts, _) in usable.items():
        if config.data.packing == "best_fit":
            rows = packing.best_fit(lengths.tolist(), seq_len)
            plans[split] = SplitPlan(_named(rows, indices), None, len(indices), counts)
            continue
        pieces = packing.cut_stream(lengths, seq_len, config.seed)
        if not pieces:
            raise ValueError(
                f"the {split} split has {lengths.sum()} tokens, less than one row of data.seq_len="
                f"{seq_len}, and data.packing=concat drops the rest of a row; use best_fit"
            )
        left = {"tokens_left_over": int(lengths.sum()) - len(pieces) * seq_len}
        rows = _named([piece.documents for piece in pieces], indices)
        skips = [piece.skip for piece in pieces]
        plans[split] = SplitPlan(rows, skips, len(indices), counts | left)
    return {"seq_len": seq_len, "pairs_per_row": 0}, plans


def plan_preferences(
    config: RunConfig, usable: dict[str, Usable], multiple: int
) -> tuple[dict[str, Any], dict]:
    """As above: every epoch's batches of R rows one after another; held-out pairs as they fit."""
    seq_len, batch_size = config.data.seq_len, config.train.batch_size
    lengths = {split: part.lengths.tolist() for split, part in usable.items()}
    dealt_by = usable["train"].dealt_by
    assert dealt_by is not None
    plan = packing.plan_pairs(
        *(lengths["train"], dealt_by.tolist(), batch_size, seq_len),
        seed=config.seed,
        epochs=config.train.epochs,
    )
    batches = [batch for epoch in plan for batch in epoch]
    needed = max(map(len, batches))
    n_rows = packing.round_up(needed, multiple)
    rows = {
        "train": [row for batch in batches for row in batch + [[]] * (n_rows - len(batch))],
        "eval": packing.best_fit(lengths["eval"], seq_len),
    }
    fill = sum(lengths["train"]) * len(plan) / (len(batches) * n_rows * seq_len)
    if fill < 0.7:
        logging.warning(
            "rows are only %.0f%% full: batches of %d pairs need %d rows of %d tokens and data x "
            "fsdp x micro_batches = %d rounds that to %d; give further chips to tensor",
            *(100 * fill, batch_size, needed, seq_len, multiple, n_rows),
        )
    fields = {
        "seq_len": seq_len,
        "pairs_per_row": max(len(row) for part in rows.values() for row in part),
        "rows_per_batch": n_rows,
        "batch_size": batch_size,
        "steps_per_epoch": len(plan[0]),
        "epochs": len(plan),
    }
    plans = {
        split: SplitPlan(_named(rows[split], part.indices), None, len(part.indices), part.counts)
        for split, part in usable.items()
    }
    return fields, plans


def pair_id_table(rows: list[list[int]], ids: np.ndarray, pairs: int) -> np.ndarray:
    """The pair ids of all rows, `rows pairs` int64, 0 where a row has no further pair."""
    out = np.zeros((len(rows), pairs), np.int64)
    for row, documents in zip(out, rows, strict=True):
        row[: len(documents)] = ids[documents]
    return out


def _named(rows: Sequence[list[int]], indices: np.ndarray) -> list[list[int]]:
    """Rows whose entries are places in `indices`, as rows of what stands there."""
    return [indices[row].tolist() for row in rows]
