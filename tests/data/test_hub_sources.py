"""Data sets from a real HTTP server on this machine: whole, cut, slow, refused, offline."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_fixtures import hub_offline, serving
from hub_server import Repo
from raw_rows import chat, dialogue, everything, report

from zephyr_jax import hub as hub_transfer
from zephyr_jax.__main__ import main
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw import hub_sources
from zephyr_jax.data.raw.hub_sources import odd_rows

CHATS, RAW = "HuggingFaceH4/ultrachat_200k", "stingning/ultrachat"
COMMIT = "f220fe796ce3ed62fbe1681b45ce6cbc9c6cabe0"


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHAT_FILES = {
    "README.md": b"# A card",
    "data/train_sft-00000-of-00002-a3.parquet": parquet([chat(n) for n in range(400)]),
    "data/train_sft-00001-of-00002-b4.parquet": parquet([chat(n) for n in range(400, 430)]),
    "data/test_sft-00000-of-00001-c5.parquet": parquet([chat(n) for n in range(430, 450)]),
    "data/train_gen-00000-of-00001-d6.parquet": parquet([chat(n) for n in range(9)]),
}
RAW_FILES = {
    f"train_{n}.jsonl": jsonl([dialogue(10 * n + m) for m in range(10)]) for n in range(10)
}
RAW_FILES["default/partial-train/0000.parquet"] = parquet([dialogue(0)])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path, monkeypatch) as server:
        for name, files in ((CHATS, CHAT_FILES), (RAW, RAW_FILES)):
            server.repos[f"datasets/{name}"] = Repo()
            server.repos[f"datasets/{name}"].commit(files)
        raw = server.repos[f"datasets/{RAW}"]
        raw.commits[COMMIT] = raw.files
        yield server


def words(tmp_path, source=CHATS, config_name="200k"):
    place = [f"--data_dir={tmp_path / 'out'}", f"--config_name={config_name}"]
    return ["prepare_data", "ultrachat", f"--source={source}", *place]


def refused(tmp_path, capsys, said, **where):
    with pytest.raises(SystemExit) as stop:
        main(words(tmp_path, **where))
    assert stop.value.code == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "out" / "ultrachat").exists()


def test_a_published_set_by_its_name(hub, tmp_path):
    main(words(tmp_path))
    path = tmp_path / "out" / "ultrachat" / "200k" / "1.0.0"
    rows, told = everything(path), report(path)
    assert rows["train_sft"] == [chat(n) for n in range(430)]
    assert rows["test_sft"] == [chat(n) for n in range(430, 450)]
    commit = hub.repos[f"datasets/{CHATS}"].refs["main"]
    assert told["origin"] == f"{CHATS}@{commit}"
    assert set(told["read_by_source"]) == {n for n in CHAT_FILES if "_sft" in n}
    assert not hub.asked("train_gen|README")
    assert all(request.authorized for request in hub.asked("HEAD /datasets"))
    hub.log.clear()
    main(words(tmp_path))
    assert not hub.asked("GET .*resolve|cdn")


def test_raw_ultrachat_is_read_at_its_revision_and_never_from_the_partial_copy(hub, tmp_path):
    path = prepare("ultrachat", RAW, tmp_path / "out")
    told = report(path)
    assert told["origin"] == f"{RAW}@{COMMIT}"
    assert set(told["read_by_source"]) == {f"train_{n}.jsonl" for n in range(10)}
    assert told["rows"]["read"] == 100
    assert not hub.asked("partial-train")
    hub.log.clear()
    with hub_offline():  # a commit never changes: nobody is asked
        assert prepare("ultrachat", f"{RAW}@{COMMIT}", tmp_path / "out") == path
    other = hub.repos[f"datasets/{RAW}"].commit({"train_0.jsonl": RAW_FILES["train_1.jsonl"]}, "v2")
    told = report(prepare("ultrachat", f"{RAW}@v2", tmp_path / "v2"))
    assert (told["origin"], told["rows"]["read"]) == (f"{RAW}@{other}", 10)


def test_the_partial_copy_is_an_error_and_other_counts_a_warning(monkeypatch):
    with pytest.raises(ValueError, match="partial conversion to parquet"):
        odd_rows("", "ultrachat", "raw", {"train": 773_913})
    assert odd_rows("", "ultrachat", "raw", {"train": 5}) is None
    said = odd_rows(f"{CHATS}@abc", "ultrachat", "200k", {"train_sft": 5, "test_sft": 23_110})
    assert said is not None
    assert "5 rows in train_sft instead of 207,865" in said


@pytest.mark.parametrize(
    "fault", [{"cut": 3000}, {"status": 503}, {"flip": True}, {"pause": 0.05}, {"ranges": False}]
)
def test_a_bad_connection_costs_nothing_but_time(hub, tmp_path, fault):
    hub.fault("GET .*cdn.*train_sft-00000", **fault)
    prepare("ultrachat", CHATS, tmp_path / "out", "200k")
    if "cut" in fault:
        assert [r.start for r in hub.asked("GET .*cdn.*train_sft-00000")] == [0, 3000]


def test_what_was_cut_off_for_good_goes_on_at_the_next_call(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_transfer, "TRIES", 2)
    hub.fault("GET .*cdn.*train_sft-00000", times=1, cut=4000)
    hub.fault("GET .*cdn.*train_sft-00000", times=9, status=503)
    refused(tmp_path, capsys, "the same command goes on from what has come")
    hub.faults.clear()
    hub.log.clear()
    main(words(tmp_path))
    assert [r.start for r in hub.asked("GET .*cdn.*train_sft-00000")] == [4000]


def test_what_is_not_there_is_named(hub, tmp_path, capsys):
    refused(tmp_path, capsys, "org/nothing is not a data set", source="org/nothing")
    refused(tmp_path, capsys, "has no revision v9", source=f"{CHATS}@v9")
    hub.repos[f"datasets/{CHATS}"].gated = True
    refused(tmp_path, capsys, f"/datasets/{CHATS}, then log in")
    hub.repos["datasets/org/pictures"] = Repo()
    hub.repos["datasets/org/pictures"].commit({"a.png": b"", "train_gen.jsonl": b"{}"})
    refused(tmp_path, capsys, "it holds a.png, train_gen.jsonl", source="org/pictures")
    refused(tmp_path, capsys, "a branch, a tag or a commit has to follow", source="org/pictures@")


def test_without_network_a_whole_copy_serves(hub, tmp_path, capsys, monkeypatch):
    with hub_offline():
        refused(tmp_path, capsys, "could not be fetched")
    made = prepare("ultrachat", CHATS, tmp_path / "out", "200k")
    with hub_offline():
        assert prepare("ultrachat", CHATS, tmp_path / "out", "200k") == made
    hub.fault("GET /api/datasets", times=9, status=503)
    monkeypatch.setattr(hub_sources.hub_transfer, "WAIT", 0.0)
    assert prepare("ultrachat", CHATS, tmp_path / "out", "200k") == made
