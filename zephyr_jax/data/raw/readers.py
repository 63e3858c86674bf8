"""Rows out of source files: jsonl (plain, .gz, .zst) and parquet, in chunks that stand alone."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from zephyr_jax.data.raw.schema import Row

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSONL, ".parquet")
CHUNK_BYTES = 16 << 20
_BATCH_ROWS = 256  # of parquet that are Python objects at once
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of a file: the lines that begin in bytes `start` to `stop`, or the row groups.

    A compressed file can only be read from its beginning and is one chunk. `size` is the chunk's
    share of the file in bytes.
    """

    path: Path
    start: int
    stop: int
    size: int


def chunks_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The chunks of a file in their order, each of about `chunk_bytes`.

    Raises:
        ValueError: a parquet file is damaged or cut off.
    """
    size = path.stat().st_size
    if path.name.endswith(".parquet"):
        with _parquet(path) as file:
            groups = file.metadata.num_row_groups
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(groups)]
        return _grouped(path, sizes, size, chunk_bytes)
    if not path.name.endswith(".jsonl"):
        return [Chunk(path, 0, size, size)]
    starts = range(0, max(size, 1), chunk_bytes)
    return [
        Chunk(path, at, min(at + chunk_bytes, size), min(chunk_bytes, size - at)) for at in starts
    ]


def _grouped(path: Path, sizes: list[int], file_size: int, chunk_bytes: int) -> list[Chunk]:
    """Neighboring row groups together until they reach the size; `sizes` are uncompressed."""
    chunks, first, held, whole = [], 0, 0, max(sum(sizes), 1)
    for i, size in enumerate(sizes):
        held += size
        if held >= chunk_bytes or i == len(sizes) - 1:
            chunks.append(Chunk(path, first, i + 1, file_size * held // whole))
            first, held = i + 1, 0
    return chunks


def read_rows(chunk: Chunk) -> Iterator[Row | str | None]:
    """Each row of a chunk: the parsed object, the reason why there is none, None for a blank line.

    Raises:
        ValueError: the file is damaged or cut off.
    """
    if chunk.path.name.endswith(".parquet"):
        yield from _parquet_rows(chunk)
        return
    for line in _lines(chunk):
        yield None if line.isspace() else parse(line)


def parse(line: bytes) -> Row | str:
    """The object in a line of JSON, or the reason why there is none.

    >>> parse(b'{"a": 1}'), parse(b"[1]"), parse(b"{")
    ({'a': 1}, 'not_an_object', 'bad_json')
    """
    try:
        row = json.loads((line[3:] if line.startswith(_BOM) else line).decode())
    except (ValueError, RecursionError):
        return "bad_json"
    return row if isinstance(row, dict) else "not_an_object"


def _lines(chunk: Chunk) -> Iterator[bytes]:
    with chunk.path.open("rb") as raw:
        if chunk.path.name.endswith(".jsonl"):
            yield from _lines_that_begin_in(raw, chunk.start, chunk.stop)
            return
        try:
            if chunk.path.name.endswith(".gz"):
                yield from gzip.GzipFile(fileobj=raw)
            else:
                yield from io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # type: ignore
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{chunk.path} is damaged ({error}): download it again") from error


def _lines_that_begin_in(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    if start:
        file.seek(start - 1)
        start += len(file.readline()) - 1  # the rest of a line that began earlier; its own newline
    while start < stop and (line := file.readline()):
        yield line
        start += len(line)


def _parquet_rows(chunk: Chunk) -> Iterator[Row]:
    with _parquet(chunk.path) as file:
        groups = list(range(chunk.start, chunk.stop))
        try:
            for batch in file.iter_batches(_BATCH_ROWS, groups):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise _damaged(chunk.path, error) from error


def _parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:120]
    return ValueError(f"{path} is damaged ({said}): download it again")


def first_row(path: Path, lines: int = 20) -> object:
    """The first row of a file that can be parsed; None if its first lines hold none."""
    if path.name.endswith(".parquet"):
        rows = read_rows(Chunk(path, 0, 1, 0)) if chunks_of(path) else iter(())
    else:
        rows = read_rows(Chunk(path, 0, os.path.getsize(path), 0))
    for row, _ in zip(rows, range(lines), strict=False):
        if isinstance(row, dict):
            return row
    return None
