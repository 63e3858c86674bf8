"""Rows out of source files: jsonl (plain, .gz, .zst) and parquet, in chunks that stand alone."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from zephyr_jax.data.raw.schema import Row

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 16 << 20
_BATCH_ROWS = 256  # of parquet that are Python objects at once


class Chunk(NamedTuple):
    """Part of a file: the lines that begin in bytes `start` to `stop`, or a parquet row group.

    A compressed file can only be read from its beginning and is one chunk.
    """

    path: Path
    start: int
    stop: int


def chunks_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The chunks of a file in their order: about `chunk_bytes` of lines, or a row group."""
    if path.name.endswith(".parquet"):
        with _explained(path), pq.ParquetFile(path) as file:
            return [Chunk(path, at, at + 1) for at in range(file.metadata.num_row_groups)]
    size = path.stat().st_size
    if not path.name.endswith(".jsonl"):
        return [Chunk(path, 0, size)]
    starts = range(0, size, chunk_bytes)
    return [Chunk(path, at, min(at + chunk_bytes, size)) for at in starts]


def read_rows(chunk: Chunk) -> Iterator[Row | str | None]:
    """Each row of a chunk: the parsed object, the reason why there is none, None for a blank line.

    A damaged file is a ValueError.
    """
    with _explained(chunk.path):
        if not chunk.path.name.endswith(".parquet"):
            for line in _lines(chunk):
                yield None if line.isspace() else _parse(line)
            return
        with pq.ParquetFile(chunk.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, list(range(chunk.start, chunk.stop))):
                yield from batch.to_pylist()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        message = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged ({message}): download it again") from error


def _parse(line: bytes) -> Row | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "bad_json"
    return row if isinstance(row, dict) else "not_an_object"


def _lines(chunk: Chunk) -> Iterator[bytes]:
    with chunk.path.open("rb") as raw:
        if chunk.path.name.endswith(".gz"):
            yield from gzip.GzipFile(fileobj=raw)
        elif chunk.path.name.endswith(".zst"):
            yield from io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # type: ignore
        else:
            start = chunk.start
            if start:
                raw.seek(start - 1)
                start += len(raw.readline()) - 1  # the rest of an earlier line; its own newline
            while start < chunk.stop and (line := raw.readline()):
                yield line
                start += len(line)
