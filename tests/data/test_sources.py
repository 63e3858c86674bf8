import pytest
from raw_rows import chat, dialogue, everything, report, write, write_raw

from zephyr_jax.data.prepare.plan import Selection
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw import dialogues, pairs
from zephyr_jax.data.raw.sources import find_sources

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
