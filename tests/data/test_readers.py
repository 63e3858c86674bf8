import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zephyr_jax.data.raw.readers import chunks_of, read_rows

ROWS = [{"id": str(n), "data": ["é" * (n % 7), None if n % 3 else {"a": n}]} for n in range(300)]


def text(rows=ROWS):
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
        assert rows_of(path, chunk_bytes) == ROWS, chunk_bytes


def test_blank_lines_keep_their_number_and_a_mark_at_the_start_goes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\n{"a": ')
    assert rows_of(path) == [{"a": 1}, None, None, {"a": 2}, "bad_json"]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert rows_of(tmp_path / "empty.jsonl") == []


def test_compressed_files_and_parquet_hold_the_same(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text()[:999]) + gzip.compress(text()[999:]))
    zstd(tmp_path / "a.jsonl.zst", text())
    flat = [{"id": row["id"], "data": row["data"][:1]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "a.parquet", row_group_size=64)
    assert rows_of(tmp_path / "a.jsonl.gz") == rows_of(tmp_path / "a.jsonl.zst") == ROWS
    for chunk_bytes in (1, 900, 1 << 20):
        assert rows_of(tmp_path / "a.parquet", chunk_bytes) == flat
    assert len(chunks_of(tmp_path / "a.parquet", 1)) == 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_half_a_file_is_damaged(tmp_path, name):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 1 << 60, 5000)
    rows = [{"id": str(n)} for n in noise]
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(text(rows)))
    elif name.endswith("zst"):
        zstd(path, text(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert rows_of(path) == rows
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        rows_of(path)
