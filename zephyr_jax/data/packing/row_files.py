"""Rows on disk: ArrayRecord files written by several processes, and random access to them.

Nothing here imports JAX: reading workers are processes of their own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled

from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Documents
from zephyr_jax.data.packing.plan import SplitPlan

ROWS_PER_FILE = 4096


class RowTask(NamedTuple):
    """The rows of one file, and the folder of their documents."""

    path: str
    documents: str
    plan: SplitPlan
    seq_len: int
    pairs: int


_documents = functools.lru_cache(maxsize=2)(Documents)


def write_rows(task: RowTask) -> dict[str, Any]:
    """Writes a file of rows; returns its `file_info`, `rows` and how many tokens are in them.

    `rows` is the sha256 of their bytes; `target_tokens` counts those that are targets.
    """
    digest, tokens, targets = hashlib.sha256(), 0, 0
    writer = ArrayRecordWriter(task.path, "group_size:1")
    for number, indices in enumerate(task.plan.rows):
        documents = [_documents(task.documents)[i] for i in indices]
        if task.plan.skips:
            row = packing.stream_row(documents, task.plan.skips[number], task.seq_len)
        else:
            row = packing.build_row(documents, task.seq_len, task.pairs)
        content = row.tobytes()
        writer.write(content)
        digest.update(content)
        tokens += int((row["segments"] > 0).sum())
        targets += int(row["loss_mask"].sum())
    writer.close()
    info = {"file": file_info(Path(task.path)), "rows": digest.hexdigest()}
    return info | {"tokens": tokens, "target_tokens": targets}


def file_info(path: Path) -> dict[str, Any]:
    """A file's `bytes` and `sha256`, as manifests have them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


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
            ValueError: if the files do not hold as many rows as the manifest says.
        """
        if self._source is None:
            source = ArrayRecordDataSource(self._files)
            if len(source) != self._n_rows:
                raise ValueError(
                    f"{Path(self._files[0]).parent} holds {len(source)} rows where its manifest "
                    f"says {self._n_rows}; delete the folder and pack again"
                )
            self._source = source
        rows = np.zeros(len(indices), self._dtype)
        real = [(at, int(i)) for at, i in enumerate(indices) if i >= 0]
        records = self._source.__getitems__([i for _, i in real]) if real else []
        for (at, _), record in zip(real, records, strict=True):
            rows[at] = np.frombuffer(record, self._dtype)[0]
        return rows


def batch_rows(
    step: int, *, n_rows: int, rows_per_batch: int, steps_per_epoch: int, seed: int
) -> np.ndarray:
    """The rows of batch `step`, -1 for empty ones: a function of the step alone.

    They are shuffled in every epoch; `steps_per_epoch` 0 leaves them in their own order.
    """
    order = np.arange(n_rows)
    if steps_per_epoch:
        epoch, step = divmod(step, steps_per_epoch)
        order = _shuffled(n_rows, seed, epoch)
    rows = order[step * rows_per_batch :][:rows_per_batch]
    return np.pad(rows, (0, rows_per_batch - len(rows)), constant_values=-1)


@functools.lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def load_batch(
    source: RowSource, rows_of: Callable[[int], np.ndarray], held: np.ndarray, step: int
) -> tuple[np.ndarray, ...]:
    """The rows `rows_of(step)` of a batch, `R`, and the five arrays of those `held` here."""
    indices = rows_of(step)
    return indices, *packing.row_arrays(source.read(indices[held]))
