import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chat, dialogue, everything, report, write, write_raw

from zephyr_jax.data.prepare.plan import Selection
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw import dialogues, pairs
from zephyr_jax.data.raw.sources import chunks_of, find_sources, read_rows

RAW, CHATS = (dialogues.ultrachat_schemas()[name] for name in ("raw", "200k"))
RATED = pairs.ultrafeedback_schemas()["raw"]


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def test_bad_rows_are_counted_and_too_many_stop(raw, tmp_path):
    bad = ["{", "[]", '{"id": "1"}', '{"id": "1", "data": [1]}', "", "\xff{}"]
    with (raw / "train_0.jsonl").open("ab") as file:
        file.write("\n".join(bad).encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"5 of 85 rows do not fit.*bad_json 2 \(train_0") as stop:
        prepare("ultrachat", raw, tmp_path / "out")
    assert "\n" not in str(stop.value)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    written = report(prepare("ultrachat", raw, tmp_path / "out", max_bad_fraction=0.1))
    assert written["rows"]["bad"] == 5
    counts = {reason: entry["count"] for reason, entry in written["bad"].items()}
    once = dict.fromkeys(("not_an_object", "missing_key:data", "wrong_type:data"), 1)
    assert counts == {"bad_json": 2} | once
    assert written["bad"]["not_an_object"]["first"] == ["train_0.jsonl:52"]
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


@pytest.mark.parametrize(
    ("source", "schema", "kind", "message"),
    [
        ("nowhere", RAW, FileNotFoundError, "not a folder, file, matching pattern or hub id"),
        ("columns", RAW, FileNotFoundError, r"it holds a\.json"),
        ("columns/a.json", RAW, ValueError, r"a\.json is not one of .*jq"),
        ("cut/a.parquet", RAW, ValueError, r"a\.parquet is damaged"),
        ("raw", RATED, ValueError, r"instruction, completions .*id, data"),
        ("raw", CHATS, ValueError, "try --config_name=raw"),
    ],
)
def test_sources_that_do_not_fit(raw, tmp_path, source, schema, kind, message):
    write(tmp_path / "columns" / "a.json", [])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(kind, match=message) as stop:
        find_sources(tmp_path / source, schema, dialogues.ultrachat_schemas())
    assert "\n" not in str(stop.value)


def test_arguments_that_do_not_fit(raw, tmp_path):
    for match, arguments in (
        ("choose one of raw, 200k", ("ultrachat", raw, tmp_path, "300k")),
        ("ultrachat, ultrafeedback", ("ultra", raw, tmp_path)),
        ("not local", ("ultrachat", raw, "gs://bucket/data")),
    ):
        with pytest.raises(ValueError, match=match):
            prepare(*arguments)


def test_one_file_and_globs(raw, tmp_path):
    one = find_sources(raw / "train_1.jsonl.gz", RAW)
    assert [source.name for source in one.files] == ["train_1.jsonl.gz"]
    write(raw / "deep" / "train_0.jsonl", [dialogue(90)])
    every = find_sources(f"{tmp_path}/**/train_0.jsonl", RAW)
    assert [source.name for source in every.files] == ["deep/train_0.jsonl", "train_0.jsonl"]


def test_published_splits_stay(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft-00000-of-00002.jsonl", map(chat, range(10)))
    write(source / "train_sft-00001-of-00002.jsonl", map(chat, range(10, 20)))
    write(source / "test_sft-00000-of-00001.jsonl", map(chat, range(20, 25)))
    write(source / "train_gen-00000-of-00001.jsonl", map(chat, range(5)))
    write(source / "extra.jsonl", map(chat, range(3)))
    path = prepare("ultrachat", source, tmp_path / "out", "200k")
    written = report(path)
    assert written["splits_by"] == "file names"
    assert sorted(written["skipped"]) == ["extra.jsonl", "train_gen-00000-of-00001.jsonl"]
    rows = everything(path)
    assert rows["train_sft"] == [chat(number) for number in range(20)]
    assert rows["test_sft"] == [chat(number) for number in range(20, 25)]


def test_a_prompt_in_both_published_splits_is_an_error(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft.jsonl", map(chat, range(10)))
    write(source / "test_sft.jsonl", map(chat, range(9, 12)))
    message = r"train_sft\.jsonl:10.*held-out split too.*--drop_overlap"
    with pytest.raises(ValueError, match=message):
        prepare("ultrachat", source, tmp_path, "200k")
    selection = Selection(drop_overlap=True)
    path = prepare("ultrachat", source, tmp_path, "200k", selection=selection)
    assert report(path)["rows"]["kept"] == {"train_sft": 9, "test_sft": 3}
    assert report(path)["rules"] == {"train_test_overlap": 1}


def test_broken_published_dialogues_are_dropped(tmp_path):
    rows = [chat(number) for number in range(40)]
    rows[0]["messages"] = rows[0]["messages"][:1]
    rows[1]["messages"][1]["content"] = " "
    rows[2]["prompt_id"] = "f00"
    written = report(prepare("ultrachat", write(tmp_path / "a.jsonl", rows), tmp_path, "200k"))
    assert written["rules"] == {"bad_roles": 1, "empty_turn": 1, "prompt_id_not_sha256": 1}
    assert sum(written["rows"]["kept"].values()) == 38


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
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\n{"a": ')
    assert rows_of(path) == [{"a": 1}, None, None, {"a": 2}, "bad_json"]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert rows_of(tmp_path / "empty.jsonl") == []


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
