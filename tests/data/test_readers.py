"""Rows of files: chunks, layouts of JSON, encodings, compression, damage."""

import functools
import gzip
import json
import os
import pathlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_jax.data.raw.readers import chunks_of, read_rows

LINES = [{"id": str(n), "data": ["é" * (n % 7), None if n % 3 else {"a": n}]} for n in range(300)]


def text(rows=LINES):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows_of(path, chunk_bytes=1 << 20):
    return [row for chunk in chunks_of(path, chunk_bytes) for row in read_rows(chunk)]


def zstd(path, content):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("content", [text(), text()[:-1]], ids=["newline at the end", "none"])
def test_any_cut_gives_each_line_once(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    first = len(content.split(b"\n")[0]) + 1
    for chunk_bytes in (2, first - 1, first, first + 1, 100, 4096, len(content), 1 << 20):
        assert rows_of(path, chunk_bytes) == LINES, chunk_bytes


def test_blank_lines_keep_their_number_and_a_mark_at_the_start_goes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\n{"a": "\xe9"}\n\0\0\n{"a": ')
    bad = ["not_utf8", "nul_bytes", "bad_json"]
    assert rows_of(path) == [{"a": 1}, None, None, {"a": 2}, *bad]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert rows_of(tmp_path / "empty.jsonl") == []


compact = functools.partial(json.dumps, ensure_ascii=False)
pretty = functools.partial(compact, indent=2)
OBJECTS = [{"a": n, "b": ["\u00e9\u2028", {"c": None}]} for n in range(3)]
LAYOUTS = {
    "lines": "\n".join(map(compact, OBJECTS)),
    "lines after blank ones": "\r\n\r\n" + "\r\n".join(map(compact, OBJECTS)),
    "a list": compact(OBJECTS),
    "a list over lines": pretty(OBJECTS),
    "a list, an object a line": "[" + ",\n".join(map(compact, OBJECTS)) + "]",
    "objects over lines": "\n".join(map(pretty, OBJECTS)),
    "lines that end in CR": "\r".join(map(compact, OBJECTS)),
    "data": pretty({"version": "1.0", "data": OBJECTS}),
    "rows": compact({"rows": [{"row_idx": n, "row": row} for n, row in enumerate(OBJECTS)]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_any_json_text_is_read_by_what_it_holds(tmp_path, layout, encoding):
    content = LAYOUTS[layout].encode(encoding)
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(content))  # a name that does not say it
    zstd(tmp_path / "a.json.zst", content)
    for name in ("a.json", "a.jsonl", "a.json.zst"):
        assert [row for row in rows_of(tmp_path / name, 10) if row is not None] == OBJECTS, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": 1\n}\n{\n"a": ,\n}', r"a\.json, line 5: not JSON \(Expecting value\)"),
        (b'[{"a": 1},\n{"a": "', r"a\.json, line 2: not JSON \(Unterminated string"),
        ('[{"a": "\u00e9"}]'.encode("latin-1"), r"a\.json is not UTF-8 .* at byte 8.*iconv"),
        (b"\xff\xfe{", r"a\.json is not UTF-16"),
    ],
)
def test_json_that_cannot_be_rows_is_told_exactly(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as stop:
        rows_of(tmp_path / "a.json")
    assert "\n" not in str(stop.value)
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match="is a pipe, and is read twice"):
        rows_of(pathlib.Path(f"/dev/fd/{reader}"))
    os.close(writer)
    os.close(reader)


def test_compressed_files_and_parquet_hold_the_same(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text()[:999]) + gzip.compress(text()[999:]))
    zstd(tmp_path / "a.jsonl.zst", text())
    flat = [{"id": row["id"], "data": row["data"][:1]} for row in LINES]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "a.parquet", row_group_size=64)
    assert rows_of(tmp_path / "a.jsonl.gz") == rows_of(tmp_path / "a.jsonl.zst") == LINES
    for chunk_bytes in (1, 900, 1 << 20):
        assert rows_of(tmp_path / "a.parquet", chunk_bytes) == flat
    assert len(chunks_of(tmp_path / "a.parquet", 1)) == 5


def test_half_a_file_is_damaged(tmp_path):
    rows = [{"id": str(n)} for n in np.random.default_rng(0).integers(0, 1 << 60, 5000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text(rows)))
    zstd(tmp_path / "a.jsonl.zst", text(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert rows_of(path) == rows
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            rows_of(path)


@pytest.mark.parametrize("packed", [False, True])
def test_lines_beyond_the_limit_and_deep_rows_are_bad_rows(tmp_path, packed):
    long, deep = b'{"a": "' + b"x" * (3 << 20) + b'"}', b'{"a": ' + b"[" * 100_000
    lines = [b'{"a": 1}', long, deep, b'{"a": 2}']
    (tmp_path / "a.jsonl").write_bytes((gzip.compress if packed else bytes)(b"\n".join(lines)))
    expected = [{"a": 1}, "longer_than_max_row_mb", "too_deep", {"a": 2}]
    for chunk_bytes in (1 << 16, 1 << 24):
        chunks = chunks_of(tmp_path / "a.jsonl", chunk_bytes)
        assert [row for chunk in chunks for row in read_rows(chunk, max_row_mb=2)] == expected
    (tmp_path / "b.jsonl").write_bytes(long)
    assert list(read_rows(*chunks_of(tmp_path / "b.jsonl"), max_row_mb=2)) == expected[1:2]
    (tmp_path / "c.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"c\.json, line 1: not JSON"):
        rows_of(tmp_path / "c.json")


def test_what_a_packed_file_inflates_to_is_never_in_memory(tmp_path):
    with gzip.GzipFile(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(64):
            file.write(b" " * (1 << 20))
        file.write(b'"}\n{"a": 2}\n')
    tracemalloc.start()
    rows = [row for chunk in chunks_of(tmp_path / "a.jsonl.gz") for row in read_rows(chunk, 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [{"a": 1}, "longer_than_max_row_mb", {"a": 2}]
    assert peak < 16 << 20
