"""Which document goes into which row: plans over the lengths of all documents, and their counts.

A plan numbers documents as they were tokenized; one that is taken twice is in it twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Rendering


class Usable(NamedTuple):
    """The documents of a split that go into rows, and what was counted on the way."""

    indices: np.ndarray  # N int64, a document taken twice in it twice
    lengths: np.ndarray  # N int64
    counts: dict[str, int]


class SplitPlan(NamedTuple):
    """The documents of every row of a split, and for a stream how much of the first to skip."""

    rows: list[list[int]]
    skips: list[int]  # empty where documents are whole


def usable_documents(
    rendering: Rendering, seq_len: int, table: np.ndarray, times: np.ndarray
) -> Usable:
    """The documents that can be learned from and fit a row; of equal pairs the first.

    `table` has `M` rows of `documents.DOCUMENT`, `times` how often each is taken, `M`.
    """
    lengths = kept = table["length"]
    counts = {"read": len(table)}
    if rendering.pairs:
        first = np.zeros(len(table), bool)
        first[np.unique(table["id"], return_index=True)[1]] = True
        kept = np.where(first & (lengths <= seq_len), lengths, 0)
        counts |= {
            "prompts_cut": int(table["prompt_cut"][first].sum()),
            "answers_cut": int(table["answer_cut"][first].sum()),
            "dropped_too_long": int((first & (lengths > seq_len)).sum()),
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
    return Usable(indices, lengths[indices], counts)


def plan_rows(
    config: RunConfig, usable: dict[str, Usable], multiple: int
) -> tuple[dict[str, Any], dict[str, SplitPlan]]:
    """The manifest's fields and a SplitPlan by split, best-fit or as a stream.

    Preferences are planned for training by epochs: each one's batches of R rows, one after another,
    R divisible by `multiple`.

    Raises:
        ValueError: if a split of a stream does not fill one row.
    """
    seq_len = config.data.seq_len
    fields, plans = {"seq_len": seq_len, "pairs_per_row": 0}, {}
    for split, part in usable.items():
        skips = []
        if config.dpo and split == "train":
            batch_fields, rows = _plan_batches(config, part, multiple)
            fields |= batch_fields
        elif config.data.packing == "best_fit":
            rows = packing.best_fit(part.lengths.tolist(), seq_len)
        else:
            rows, skips = packing.cut_stream(part.lengths, seq_len, config.seed)
            n_tokens = int(part.lengths.sum())
            if not rows:
                raise ValueError(
                    f"the {split} split has {n_tokens} tokens, less than one row of data.seq_len="
                    f"{seq_len}, and data.packing=concat drops the rest of a row; use best_fit"
                )
            part.counts["tokens_left_over"] = n_tokens - len(rows) * seq_len
        plans[split] = SplitPlan([part.indices[row].tolist() for row in rows], skips)
    if config.dpo:
        fields["pairs_per_row"] = max(len(row) for plan in plans.values() for row in plan.rows)
    return fields, plans


def _plan_batches(
    config: RunConfig, part: Usable, multiple: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """The manifest's fields and the rows of every epoch's batches, all of R rows."""
    seq_len, batch_size = config.data.seq_len, config.train.batch_size
    lengths, epochs = part.lengths.tolist(), config.train.epochs
    plan = packing.plan_pairs(lengths, batch_size, seq_len, seed=config.seed, epochs=epochs)
    batches = [batch for epoch in plan for batch in epoch]
    needed = max(map(len, batches))
    n_rows = packing.round_up(needed, multiple)
    fill = sum(lengths) * epochs / (len(batches) * n_rows * seq_len)
    if fill < 0.7:
        logging.warning(
            "rows are only %.0f%% full: batches of %d pairs need %d rows of %d tokens and data x "
            "fsdp x micro_batches = %d rounds that to %d; give further chips to tensor",
            *(100 * fill, batch_size, needed, seq_len, multiple, n_rows),
        )
    fields = {
        "rows_per_batch": n_rows,
        "batch_size": batch_size,
        "steps_per_epoch": len(plan[0]),
        "epochs": epochs,
    }
    return fields, [row for batch in batches for row in batch + [[]] * (n_rows - len(batch))]
