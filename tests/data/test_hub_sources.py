"""Data sets from a hub on this machine: which files are read, refusals, offline."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Repo, serving
from raw_rows import chat, dialogue, everything, report

from zephyr_jax.__main__ import main
from zephyr_jax.data.raw.dialogues import ultrachat_schemas
from zephyr_jax.data.raw.sources import ULTRACHAT_REVISION, find_sources

CHATS, RAW = "HuggingFaceH4/ultrachat_200k", "stingning/ultrachat"


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


CHAT_FILES = {
    "README.md": b"# A card",
    "data/train_sft-00000-of-00002-a3.parquet": parquet([chat(n) for n in range(40)]),
    "data/train_sft-00001-of-00002-b4.parquet": parquet([chat(n) for n in range(40, 43)]),
    "data/test_sft-00000-of-00001-c5.parquet": parquet([chat(n) for n in range(43, 45)]),
    "data/train_gen-00000-of-00001-d6.parquet": parquet([chat(n) for n in range(9)]),
}
RAW_FILES = {f"train_{n}.jsonl": json.dumps(dialogue(n)).encode() for n in range(10)}
RAW_FILES["default/partial-train/0000.parquet"] = parquet([dialogue(0)])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path, monkeypatch) as server:
        for name, files in ((CHATS, CHAT_FILES), (RAW, RAW_FILES)):
            server.repos[f"datasets/{name}"] = Repo()
            server.repos[f"datasets/{name}"].commit(files)
        raw = server.repos[f"datasets/{RAW}"]
        raw.commits[ULTRACHAT_REVISION] = raw.files
        yield server


def test_a_published_set_is_prepared_by_its_name(hub, tmp_path):
    words = ["prepare_data", "ultrachat", f"--source={CHATS}", "--config_name=200k"]
    main([*words, f"--data_dir={tmp_path / 'out'}"])
    path = tmp_path / "out" / "ultrachat" / "200k" / "1.1.0"
    rows = everything(path)
    assert rows["train_sft"] == [chat(n) for n in range(43)]
    assert rows["test_sft"] == [chat(n) for n in range(43, 45)]
    commit = hub.repos[f"datasets/{CHATS}"].refs["main"]
    assert report(path)["origin"] == f"{CHATS}@{commit}"
    assert set(report(path)["read_by_source"]) == {n for n in CHAT_FILES if "_sft" in n}
    assert not hub.requests("train_gen")


def test_raw_ultrachat_is_read_at_its_revision_and_never_from_the_partial_copy(hub):
    schema = ultrachat_schemas()["raw"]
    sources = find_sources(RAW, schema)
    assert sources.origin == f"{RAW}@{ULTRACHAT_REVISION}"
    assert [source.name for source in sources.files] == [f"train_{n}.jsonl" for n in range(10)]
    assert not hub.requests("partial-train")
    hub.log.clear()
    assert find_sources(f"{RAW}@{ULTRACHAT_REVISION}", schema) == sources
    assert not hub.log  # the content of a commit never changes
    other = hub.repos[f"datasets/{RAW}"].commit({"train_0.jsonl": RAW_FILES["train_0.jsonl"]}, "v2")
    assert find_sources(f"{RAW}@v2", schema).origin == f"{RAW}@{other}"


def test_refusals_are_one_line(hub):
    def refused(source, message):
        with pytest.raises(FileNotFoundError, match=message) as stop:
            find_sources(source, ultrachat_schemas()["200k"])
        assert "\n" not in str(stop.value)

    refused("org/nothing", "org/nothing is not a dataset")
    hub.repos["datasets/org/pictures"] = Repo()
    hub.repos["datasets/org/pictures"].commit({"a.png": b"", "train_gen.jsonl": b"{}"})
    refused("org/pictures", r"it holds a\.png, train_gen\.jsonl")
    hub.repos[f"datasets/{CHATS}"].gated = True
    refused(CHATS, f"/datasets/{CHATS}, then log in")


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: rows/a*.parquet
  - split: validation
    path: [rows/b.parquet]
---
# A card
"""


def test_splits_that_a_card_declares_and_those_of_names_stay(hub):
    def prepared(files):
        hub.repos["datasets/org/own"] = Repo()
        hub.repos["datasets/org/own"].commit(files)
        files = find_sources("org/own", ultrachat_schemas()["200k"]).files
        return {file.name: file.split for file in files}

    a, b = parquet([chat(1)]), parquet([chat(2)])
    named = {"data/train-00000-of-00001.parquet": a, "data/test-00000-of-00001.parquet": b}
    splits = ("train_sft", "test_sft")
    assert prepared(named) == dict(zip(named, splits, strict=True))
    rows = {"rows/a1.parquet": a, "rows/b.parquet": b}
    assert set(prepared(rows).values()) == {None}
    assert prepared(rows | {"README.md": CARD}) == dict(zip(rows, splits, strict=True))
    with pytest.raises(ValueError, match=r"train/rows/a_test\.parquet in org/own names both"):
        prepared({"README.md": CARD, "rows/a_test.parquet": a, "rows/b.parquet": b})
