"""Rows from files of jsonl, JSON (plain, .gz, .zst) and parquet, in chunks.

What a text holds decides how it is read, not its name: lines or a whole, encoding, compression.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from zephyr_jax.data.raw.schema import Row

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
AS_LINES = (
    "write rows out as one JSON object a line, as pandas (read_csv(FILE).to_json('rows.jsonl', "
    "orient='records', lines=True)) or datasets (load_from_disk(FOLDER).to_json('rows.jsonl')) do"
)
CHUNK_BYTES = 16 << 20
MAX_ROW_MB = 64  # of a line in a text; a longer one is a bad row, and never in memory
_MAX_WHOLE = 1 << 30  # bytes of a text that is read as a whole
_BATCH_ROWS = 256  # of parquet that are Python objects at once
# Under one of these keys an object holds all rows of a file.
_ROWS = ("data", "rows", "train", "examples", "records", "items", "samples")
_BLANK = re.compile(r"\s*")


class Chunk(NamedTuple):
    """Part of a file: the lines that begin in bytes `start` to `stop`, or a parquet row group."""

    path: Path
    start: int
    stop: int


def chunks_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The chunks of a file in their order: about `chunk_bytes` of lines, or a row group."""
    with _explained(path):
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                return [Chunk(path, at, at + 1) for at in range(file.metadata.num_row_groups)]
        size = path.stat().st_size
        with _open(path) as file:
            plain = isinstance(getattr(file, "raw", None), io.FileIO)  # not packed, and in UTF-8
            if not plain or size <= chunk_bytes or not _is_lines(file, MAX_ROW_MB << 20):
                return [Chunk(path, 0, sys.maxsize)]
        return [Chunk(path, at, at + chunk_bytes) for at in range(0, size, chunk_bytes)]


def read_rows(chunk: Chunk, max_row_mb: int = MAX_ROW_MB) -> Iterator[Row | str | None]:
    """Each row of a chunk: the parsed object, the reason why there is none, None for a blank line.

    A file that is damaged, or JSON that cannot be read as rows, is a ValueError.
    """
    path, limit = chunk.path, max_row_mb << 20
    with _explained(path):
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if twice := next((name for name in names if names.count(name) > 1), ""):
                    raise ValueError(f"{path} has two columns {twice}: write it with one of them")
                for batch in file.iter_batches(_BATCH_ROWS, list(range(chunk.start, chunk.stop))):
                    yield from batch.to_pylist()
            return
        with _open(path) as file:
            if not chunk.start and not _is_lines(file, limit):
                yield from _documents(path, limit)
                return
        with _open(path) as file:
            at = chunk.start
            if at:
                file.seek(at - 1)
                _, size = _read_line(file, limit)  # the rest of an earlier line; its own newline
                at += size - 1
            while at < chunk.stop:
                line, size = _read_line(file, limit)
                if not size:
                    return
                at += size
                yield "longer_than_max_row_mb" if size > limit else _parse(line)


def numbered_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """The rows of a file as `read_rows` gives them, each after its number, blank lines left out."""
    rows = itertools.chain.from_iterable(map(read_rows, chunks_of(path)))
    return ((number, row) for number, row in enumerate(rows, 1) if row is not None)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16, decompressed; a ValueError says what is wrong."""
    with _explained(path), _open(path) as file:
        return _read_whole(file, path).decode("utf-8-sig")


def _open(path: Path) -> IO[bytes]:
    """A file's decompressed bytes, in UTF-8 if they are UTF-16; a mark at the beginning stays."""
    with path.open("rb") as raw:
        if not raw.seekable():
            raise ValueError(f"{path} is a pipe, and is read twice: write its content to a file")
        head = raw.read(4)
    file: Any
    if head.startswith(b"\x1f\x8b"):
        file = gzip.open(path)  # noqa: SIM115 (the caller closes it)
    elif head == b"\x28\xb5\x2f\xfd":
        file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))  # type: ignore
    else:
        file = path.open("rb")
    encoding = json.detect_encoding(file.peek(4)[:4])
    if encoding.startswith("utf-8"):
        return file
    with file:
        return io.BytesIO(_read_whole(file, path).decode(encoding).encode())


def _read_whole(file: IO[bytes], path: Path) -> bytes:
    content = file.read(_MAX_WHOLE + 1)
    if len(content) > _MAX_WHOLE:
        size = f"{_MAX_WHOLE >> 20:,} MB"
        raise ValueError(f"{path} is one list or object, or UTF-16, of over {size}: {AS_LINES}")
    return content


def _read_line(file: IO[bytes], limit: int) -> tuple[bytes, int]:
    """The next line, or as much of it as the limit allows, and its whole size; 0 at the end."""
    line = rest = file.readline(limit + 1)
    size = len(line)
    while size > limit and rest and not rest.endswith(b"\n"):
        rest = file.readline(1 << 20)
        size += len(rest)
    return line, size


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {error.encoding.upper()} ({error.reason} at byte {error.start}): "
            "convert it, as by iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    except (EOFError, OSError, OverflowError, KeyError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR):
            raise
        message = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged ({message}): download it again") from error


def _parse(line: bytes) -> Row | str | None:
    """The object in a line, the reason why there is none, or None for a blank line."""
    if not line.removeprefix(codecs.BOM_UTF8).strip():
        return None
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not_utf8"
    except RecursionError:
        return "too_deep"
    except ValueError:
        return "nul_bytes" if b"\0" in line else "bad_json"
    return row if isinstance(row, dict) else "not_an_object"


def _is_lines(file: IO[bytes], limit: int) -> bool:
    """Whether a text has one row a line, damaged ones among them; else it is JSON as a whole."""
    lines = iter(lambda: _read_line(file, limit)[0].removeprefix(codecs.BOM_UTF8), b"")
    texts = (text for line in lines if (text := line.strip()))
    first, second = (*itertools.islice(texts, 2), b"", b"")[:2]
    if not second:
        return not first.startswith((b"{", b"["))
    if _parse(first) != "bad_json":
        return True
    continues = first.startswith(b"{") and first.endswith((b"{", b"[", b",")) and len(first) < limit
    return not first.startswith(b"[") and not continues


def _documents(path: Path, limit: int) -> Iterator[Row | str]:
    """The rows of a text that is JSON as a whole: of a list, or objects one after another."""
    text, decoder, values, at = read_text(path), json.JSONDecoder(), [], 0
    while (at := _BLANK.match(text, at).end()) < len(text):  # type: ignore  # it always matches
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line, why = text.count("\n", 0, getattr(error, "pos", at)) + 1, str(error).split(":")[0]
            raise ValueError(
                f"{path}, line {line}: not JSON ({why}), where a list or an object of several "
                "lines goes on; fix it there, or download the file again"
            ) from error
        values.append(value)
    rows = _rows_of(values[0]) if len(values) == 1 else values
    if rows == values[:1] and len(text) > limit:
        rows = ["longer_than_max_row_mb"]
    yield from (row if isinstance(row, dict | str) else "not_an_object" for row in rows)


def _rows_of(value: Any) -> list[Any]:
    """The rows of a list, of an object that holds one list of them, or of one that is a row."""
    if isinstance(value, list):
        return value
    lists = [x for x in value.values() if isinstance(x, list) and x and isinstance(x[0], dict)]
    if len(lists) != 1 or not any(value.get(key) is lists[0] for key in _ROWS):
        return [value]
    return [row.get("row", row) for row in lists[0]]  # the hub's viewer has {"row": {...}}
