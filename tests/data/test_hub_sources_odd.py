"""Data sets from the hub that are odd: half served, half listed, renamed, moved, miscounted."""

import pytest
from hub_server import Repo
from test_hub_sources import CHATS, RAW, RAW_FILES, hub, parquet, refused, words

from zephyr_jax import hub as hub_transfer
from zephyr_jax.__main__ import main
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw.binarize import exchange
from zephyr_jax.data.raw.hub_sources import download_rows, odd_rows, wanted_files
from zephyr_jax.data.raw.published import PAPER_REVISION, published

__all__ = ["hub"]
SFT = ("train_sft", "test_sft")
PAIRS = "HuggingFaceH4/ultrafeedback_binarized"


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *args: said.append(text % args))
    return said


def test_half_a_file_is_no_file_and_goes_on_when_the_rest_is_there(hub, tmp_path, capsys):
    hub.fault("GET .*cdn.*train_sft-00000", times=99, short=5000)
    refused(tmp_path, capsys, "ends after 5,000 of its announced")
    hub.faults.clear()
    hub.log.clear()
    main(words(tmp_path))
    assert [r.start for r in hub.asked("GET .*cdn.*train_sft-00000")] == [5000]


@pytest.mark.parametrize("where", ["HEAD /datasets", "GET /cdn/datasets"])
def test_a_listed_file_that_is_not_there_is_told_from_a_missing_set(hub, tmp_path, capsys, where):
    hub.fault(f"{where}/.*train_sft-00001", times=99, status=404)
    refused(tmp_path, capsys, f"lists a file of {CHATS} that it does not serve")


def test_wrong_bytes_for_good_are_refused(hub, tmp_path, capsys):
    hub.fault("GET .*cdn.*train_sft-00000", times=9, flip=True)
    refused(tmp_path, capsys, "came twice with other bytes than the hub announced")


def test_a_branch_that_moves_while_loading_gives_one_commit(hub, monkeypatch):
    fetch, repo = hub_transfer.fetch, hub.repos[f"datasets/{CHATS}"]
    first = repo.refs["main"]

    def fetch_and_move(*args):
        fetch(*args)
        repo.commit({"other.parquet": b"x"})

    monkeypatch.setattr(hub_transfer, "fetch", fetch_and_move)
    folder, files, origin = download_rows(CHATS, SFT)
    assert origin == f"{CHATS}@{first}"
    assert len(files) == 3
    assert all((folder / file).exists() for file in files)


def test_a_known_file_that_is_missing_is_named(hub, tmp_path, warnings):
    hub.repos[f"datasets/{RAW}"].commit({"train_0.jsonl": RAW_FILES["train_0.jsonl"]}, "v2")
    prepare("ultrachat", f"{RAW}@v2", tmp_path)
    assert [said for said in warnings if "train_1.jsonl" in said and "train_9.jsonl" in said]


def test_only_folders_of_partial_copies_are_left_out():
    listed = ["impartial-judges.jsonl", "default/partial-train/0.jsonl"]
    assert wanted_files("org/x", listed, SFT) == ["impartial-judges.jsonl"]


def test_a_known_set_serves_what_is_not_known_of_it_too():
    listed = ["data/train_prefs-0.parquet", "data/train_sft-0.parquet"]
    assert wanted_files(PAIRS, listed, SFT) == ["data/train_sft-0.parquet"]
    assert wanted_files(PAIRS, listed, ("train_prefs",)) == ["data/train_prefs-0.parquet"]


def test_the_paper_s_revision_has_its_own_counts():
    told = (f"{PAIRS}@{PAPER_REVISION}", "ultrafeedback", "binarized")
    assert odd_rows(*told, {"train_prefs": 61_966, "test_prefs": 2_000}) is None
    said = odd_rows(*told, {"train_prefs": 61_135, "test_prefs": 2_000})
    assert said is not None
    assert "61,135 rows in train_prefs instead of 61,966" in said


def test_plain_splits_are_counted_apart(hub, tmp_path, monkeypatch, warnings):
    name = "trl-lib/ultrafeedback_binarized"
    for split, rows in (("train", 30), ("test", 5)):
        monkeypatch.setitem(published(name).rows, split, rows)
    pairs = [
        {"chosen": exchange(f"Q{n}?", "a"), "rejected": exchange(f"Q{n}?", "b")}
        | {"score_chosen": 8.0, "score_rejected": 3.0}
        for n in range(35)
    ]
    files = {
        "data/train-0.parquet": parquet(pairs[:30]),
        "data/test-0.parquet": parquet(pairs[30:]),
    }
    repo = hub.repos[f"datasets/{name}"] = Repo()
    repo.commit(files)
    prepare("ultrafeedback", name, tmp_path / "a", "binarized")
    assert not [said for said in warnings if "instead of" in said]
    repo.commit(files | {"data/test-0.parquet": parquet(pairs[31:])})
    prepare("ultrafeedback", name, tmp_path / "b", "binarized")
    assert [said for said in warnings if "4 rows in test instead of 5" in said]
