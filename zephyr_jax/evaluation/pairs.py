"""The table of scored preference pairs of training and evaluation: float64 on the host."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from etils import epath

from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.data.tokenizer_files import reading
from zephyr_jax.losses.pairs import PairLogps, label_metrics, means_of, preference_metrics
from zephyr_jax.losses.preference import kto
from zephyr_jax.storage import write_atomic


class PairTable(NamedTuple):
    """Scored pairs, one a row; in the last axis the chosen answer, then the rejected one."""

    ids: np.ndarray  # N int64
    losses: np.ndarray  # N float64
    logps: np.ndarray  # N 2 float64, nats
    ref_logps: np.ndarray  # N 2 float64; zeros without a reference
    tokens: np.ndarray  # N 2 float64, target tokens


def pair_table(batches: Iterable[PairTable], ties: np.ndarray) -> PairTable:
    """The pairs of some batches `R K` in one table: places without a pair (id 0) are left out.

    The answers of the pairs `ties` are the same tokens, which two places of a row round apart: both
    get the log-probs of the first.
    """
    parts = list(batches)
    columns = []
    for name in PairTable._fields:
        arrays = [getattr(part, name)[part.ids != 0] for part in parts]
        columns.append(np.concatenate(arrays).astype(np.int64 if name == "ids" else np.float64))
    table = PairTable(*columns)
    same = np.isin(table.ids, ties)
    for logps in (table.logps, table.ref_logps):
        logps[same, 1] = logps[same, 0]
    return table


def pair_columns(table: PairTable, beta: float) -> dict[str, np.ndarray]:
    """The metrics of every pair, `N` each: loss, `losses.pairs.preference_metrics`, and drift.

    `drift/*` is the log-prob less the reference's, nats an answer; `kl` its mean over both answers
    with the sign turned, of KL(reference || policy). `lengths/*` count target tokens.
    """
    drift = table.logps - table.ref_logps
    values = {"loss": table.losses, "kl": -drift.mean(axis=1)}
    values |= preference_metrics(table.logps, table.ref_logps, beta)
    for i, answer in enumerate(("chosen", "rejected")):
        values |= {f"drift/{answer}": drift[:, i], f"lengths/{answer}": table.tokens[:, i]}
    return values


# The names of `pair_columns`, and those of `pair_means` of labeled answers
PAIR_METRICS = tuple(pair_columns(PairTable(*(np.zeros((0, 2)) for _ in PairTable._fields)), 1.0))
LABEL_METRICS = ("loss", "kl", "rewards/accuracies", "rewards/ties", "rewards/margins")
LABEL_METRICS += ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def labeled_losses(table: PairTable, dpo: DpoConfig) -> np.ndarray:
    """KTO's losses of labeled answers, `N`, under the KL estimate of the whole table."""
    columns = (*table.logps.T, *table.ref_logps.T, *table.tokens.T)
    pairs = PairLogps(*columns, shift=None, desirable=table.ids > 0)
    return np.asarray(kto(pairs, dpo, np.ones(len(table.ids))), np.float64)


def pair_means(table: PairTable, beta: float, labeled: bool = False) -> dict[str, float]:
    """The means of `pair_columns`, or of `label_metrics` of labeled answers, with the loss."""
    if labeled:  # in place of pairs an answer and a mismatched one; the id's sign is the label
        good = (table.ids > 0).astype(np.float64)
        values = {"loss": table.losses, "weight": np.ones(len(good))}
        values |= label_metrics(table.logps, table.ref_logps, good, beta)
        return means_of({name: float(column.sum()) for name, column in values.items()})
    columns = pair_columns(table, beta)
    return {name: float(np.mean(column, dtype=np.float64)) for name, column in columns.items()}


def by_source(
    table: PairTable, sources: dict[int, str], beta: float, labeled: bool = False
) -> dict[str, dict[str, float]]:
    """`pair_means` of each source's pairs ("unknown": of none) and their number, largest first."""
    out = {}
    for name, here in masks_of([sources.get(int(i), "") for i in table.ids]).items():
        part = PairTable(*(column[here] for column in table))
        out[name] = {"pairs": float(here.sum())} | pair_means(part, beta, labeled)
    return out


def masks_of(sources: Iterable[str]) -> dict[str, np.ndarray]:
    """Which of `N` documents each source ("": unknown) gave; the largest source first."""
    names = np.asarray([name or "unknown" for name in sources])
    unique, counts = np.unique(names, return_counts=True)
    return {str(name): names == name for name in unique[np.argsort(-counts, kind="stable")]}


def save_table(table: PairTable, path: str | os.PathLike[str]) -> None:
    """Writes the table as a NumPy archive with a column for each field."""
    write_atomic(path, lambda file: np.savez(file, **table._asdict()))


def load_table(path: str | os.PathLike[str]) -> PairTable:
    """The table that `save_table` wrote."""
    with reading(path), np.load(io.BytesIO(epath.Path(path).read_bytes())) as stored:
        return PairTable(**{name: stored[name] for name in PairTable._fields})
