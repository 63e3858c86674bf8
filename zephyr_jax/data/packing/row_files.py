"""Rows on disk: ArrayRecord files written by several processes, and the way back to batches.

Nothing here imports JAX: reading workers are processes of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled

from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Tokenized
from zephyr_jax.data.packing.remote import file_info

ROWS_PER_FILE = 4096


class RowTask(NamedTuple):
    """The rows of one file, as `packing_plan.SplitPlan` has them, and where their documents are."""

    path: str
    done: str  # a file that says what was written, once it was
    portions: tuple[str, ...]
    dtype: str  # of the portions' numbers
    rows: list[list[int]]
    skips: list[int] | None
    seq_len: int
    pairs: int
    share_prompt: bool


@functools.lru_cache(maxsize=2)
def _tokenized(portions: tuple[str, ...], dtype: str) -> Tokenized:
    return Tokenized(portions, np.dtype(dtype))


def write_rows(task: RowTask) -> dict[str, Any]:
    """Writes a file of rows unless that is done.

    Returns its size and hash, the sha256 of its rows, and how many tokens and targets they have.
    """
    path, done = Path(task.path), Path(task.done)
    if done.is_file():
        return json.loads(done.read_text())
    source = _tokenized(task.portions, task.dtype)
    digest, tokens, targets = hashlib.sha256(), 0, 0
    part = done.with_name(f"{path.name}.{os.getpid()}")  # see `tokenized.tokenize`
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for number, documents in enumerate(task.rows):
        row = _row(source, task, number, documents)
        content = row.tobytes()
        writer.write(content)
        digest.update(content)
        tokens += int((row["segments"] > 0).sum())
        targets += int(row["loss_mask"].sum())
    writer.close()
    os.replace(part, path)
    told = {"file": file_info(path), "rows": digest.hexdigest(), "tokens": tokens}
    told |= {"target_tokens": targets}
    part.write_text(json.dumps(told))
    os.replace(part, done)
    return told


def _row(source: Tokenized, task: RowTask, number: int, documents: list[int]) -> np.ndarray:
    if task.skips is not None:
        codes = source.stream(documents, task.skips[number], task.seq_len)
        return packing.stream_row(codes >> 1, codes & 1)
    if task.pairs:
        made = [source.pair(i, task.share_prompt) for i in documents]
    else:
        made = [source.dialogue(i) for i in documents]
    return packing.build_row(made, task.seq_len, task.pairs)


class RowSource:
    """Random access to the rows of one split; it pickles, and opens its files when first read."""

    def __init__(self, files: list[str], n_rows: int, dtype: np.dtype):
        self._files, self._n_rows, self._dtype = files, n_rows, dtype
        self._source: ArrayRecordDataSource | None = None

    def __len__(self) -> int:
        return self._n_rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at these indices, as a structured array; an index of -1 gives an empty row.

        Raises:
            ValueError: if a file does not hold what the manifest says.
        """
        if self._source is None:
            source = ArrayRecordDataSource(self._files)
            if len(source) != self._n_rows:
                raise ValueError(
                    f"{Path(self._files[0]).parent} holds {len(source)} rows where its manifest "
                    f"says {self._n_rows}; delete the folder and pack again"
                )
            self._source = source
        out = np.zeros(len(indices), self._dtype)
        real = [(at, int(i)) for at, i in enumerate(indices) if i >= 0]
        records = self._source.__getitems__([i for _, i in real]) if real else []
        for (at, _), record in zip(real, records, strict=True):
            out[at] = np.frombuffer(record, self._dtype)[0]
        return out


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """Which rows make up the batch of a step: a function of the step alone.

    `steps_per_epoch` 0: the rows in their own order; otherwise shuffled anew in every epoch.
    """

    n_rows: int
    rows_per_batch: int
    steps_per_epoch: int
    seed: int

    def __call__(self, step: int) -> np.ndarray:
        """The rows of batch `step`, -1 for empty ones."""
        order, at = None, step
        if self.steps_per_epoch:
            epoch, at = divmod(step, self.steps_per_epoch)
            order = _shuffled(self.n_rows, self.seed, epoch)
        at *= self.rows_per_batch
        here = np.arange(at, min(at + self.rows_per_batch, self.n_rows))
        out = np.full(self.rows_per_batch, -1)
        out[: len(here)] = here if order is None else order[here]
        return out


@functools.lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


@dataclasses.dataclass(frozen=True)
class BatchLoader:
    """Reads some rows of every batch: step -> (indices of all, the arrays of `Rows` of some)."""

    source: RowSource
    order: RowOrder
    held: np.ndarray  # which rows of a batch to read

    def __call__(self, step: int) -> tuple[np.ndarray, ...]:
        """The row numbers `R` of batch `step`, and the five arrays of the rows held."""
        indices = self.order(step)
        got = self.source.read(indices[self.held])
        names = ("tokens", "segments", "positions", "branches")
        arrays = [got[name].astype(np.int32) for name in names]
        return indices, *arrays, np.ascontiguousarray(got["loss_mask"])
