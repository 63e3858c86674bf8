import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_rows import chat, dialogue, everything, report, write

from zephyr_jax.__main__ import main
from zephyr_jax.data.prepare.prepare import Selection, prepare
from zephyr_jax.data.raw import dialogues, pairs
from zephyr_jax.data.raw.sources import find_sources, split_words

RAW, CHATS = (dialogues.ultrachat_schemas()[name] for name in ("raw", "200k"))
RATED = pairs.ultrafeedback_schemas()["raw"]


def test_bad_rows_are_counted_and_too_many_stop(raw, tmp_path):
    bad = ["{", "[]", '{"id": "1"}', '{"id": "1", "data": [1]}', "", "\xff{}"]
    with (raw / "train_0.jsonl").open("ab") as file:
        file.write("\n".join(bad).encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"5 of 85 rows do not fit.*bad_json 1 \(train_0") as stop:
        prepare("ultrachat", raw, tmp_path / "out")
    assert "\n" not in str(stop.value)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    written = report(prepare("ultrachat", raw, tmp_path / "out", max_bad_fraction=0.1))
    assert written["rows"]["bad"] == 5
    counts = {reason: entry["count"] for reason, entry in written["bad"].items()}
    reasons = ("bad_json", "not_utf8", "not_an_object", "missing_key:data", "wrong_type:data")
    assert counts == dict.fromkeys(reasons, 1)
    assert written["bad"]["not_an_object"]["first"] == ["train_0.jsonl:52"]
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


@pytest.mark.parametrize(
    ("source", "schema", "kind", "message"),
    [
        ("nowhere", RAW, FileNotFoundError, "not a folder, file or matching pattern, or a hub id"),
        ("columns", RAW, FileNotFoundError, r"it holds a\.csv"),
        ("columns/a.csv", RAW, ValueError, r"a\.csv is not one of .*read_csv"),
        ("two.json", RAW, ValueError, r"two\.json: its first record has train, test"),
        ("page.json", RAW, ValueError, r"page\.json: its first row is bad_json"),
        ("empty.jsonl", RAW, ValueError, r"empty\.jsonl: it has no rows"),
        ("cut/a.parquet", RAW, ValueError, r"a\.parquet is damaged"),
        ("twice.parquet", RAW, ValueError, r"twice\.parquet has two columns data: write it with"),
        ("cut", RAW, FileNotFoundError, r"cut/b\.jsonl is a link to gone/b\.jsonl, which is not"),
        ("cut/b.jsonl", RAW, FileNotFoundError, r"b\.jsonl is a link to gone/b\.jsonl"),
        ("raw", RATED, ValueError, r"instruction, completions .*id, data"),
    ],
)
def test_sources_that_do_not_fit(raw, tmp_path, source, schema, kind, message):
    write(tmp_path / "columns" / "a.csv", [])
    write(tmp_path / "empty.jsonl", [])
    (tmp_path / "page.json").write_text("<html>\n</html>")
    write(tmp_path / "two.json", [{"train": [dialogue(1)], "test": [dialogue(2)]}])
    pq.write_table(pa.table([["a"]] * 3, ["id", "data", "data"]), tmp_path / "twice.parquet")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut" / "b.jsonl").symlink_to("gone/b.jsonl")
    with pytest.raises(kind, match=message) as stop:
        find_sources(tmp_path / source, schema)
    assert "\n" not in str(stop.value)


def test_arguments_that_do_not_fit(raw, tmp_path):
    for match, arguments in (
        ("choose one of raw, 200k", ("ultrachat", raw, tmp_path, "300k")),
        ("ultrachat, ultrafeedback", ("ultra", raw, tmp_path)),
        ("not local", ("ultrachat", raw, "gs://bucket/data")),
    ):
        with pytest.raises(ValueError, match=match):
            prepare(*arguments)
    for option in ({"max_row_mb": 0}, {"max_row_mb": 10**9}, {"max_bad_fraction": float("nan")}):
        with pytest.raises(ValueError, match=r"max_\w+=[\dna]+ must be .*from"):
            prepare("ultrachat", raw, tmp_path, **option)


def test_one_file_and_globs(raw, tmp_path):
    one = find_sources(raw / "train_1.jsonl.gz", RAW)
    assert [source.name for source in one.files] == ["train_1.jsonl.gz"]
    write(raw / "deep" / "train_0.jsonl", [dialogue(90)])
    every = [source.name for source in find_sources(f"{tmp_path}/**/train_0.jsonl", RAW).files]
    assert every == ["raw/deep/train_0.jsonl", "raw/train_0.jsonl"]
    for odd in ("a[1]", "b*", "c?d"):  # literally, and as what a pattern begins with
        write(tmp_path / odd / "rows[0].jsonl", [dialogue(1)])
        for source in (odd, f"{odd}/rows[0].jsonl", f"{odd}/*.jsonl"):
            assert [x.name for x in find_sources(tmp_path / source, RAW).files] == ["rows[0].jsonl"]


def test_published_splits_stay(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft-00000-of-00002.jsonl", map(chat, range(10)))
    write(source / "train_sft-00001-of-00002.jsonl", map(chat, range(10, 20)))
    write(source / "test_sft-00000-of-00001.jsonl", map(chat, range(20, 25)))
    write(source / "train_gen-00000-of-00001.jsonl", map(chat, range(5)))
    write(source / "validation.jsonl", [chat(26)])
    write(source / "extra.jsonl", [chat(25)])
    path = prepare("ultrachat", source, tmp_path / "out", "200k")
    written = report(path)
    assert written["splits_by"] == "file names"
    assert sorted(written["skipped"]) == ["train_gen-00000-of-00001.jsonl"]
    rows = everything(path)
    assert rows["train_sft"] == [chat(number) for number in (25, *range(20))]
    assert rows["test_sft"] == [chat(number) for number in (*range(20, 25), 26)]


HELD_OUT = """test.jsonl valid.jsonl myTest.json val.jsonl dev.jsonl eval.jsonl heldout.jsonl
    evaluation.jsonl held_out.jsonl hold-out.jsonl testing.jsonl TEST.jsonl my_test.jsonl test2.json
    test-00000-of-00001.jsonl validation.json chats-val-v2.jsonl test/0.jsonl a/dev/x.json"""
OTHERS = """latest.jsonl contest.jsonl devices.jsonl evaluator.jsonl training_notes.json
    value.jsonl validity.jsonl protest-2.jsonl medieval.jsonl pr\u00e9test.jsonl"""
TRAINING = "train.jsonl train-00000-of-00001.jsonl TRAIN_v1.json train/0.jsonl"


@pytest.mark.parametrize(
    ("names", "words"), [(HELD_OUT, {False}), (OTHERS, set()), (TRAINING, {True})]
)
def test_words_of_a_name_that_tell_its_split(names, words):
    assert [name for name in names.split() if {*split_words(name).values()} != words] == []


def messages_of(*numbers):
    return [{"messages": chat(number)["messages"]} for number in numbers]


@pytest.mark.parametrize("test", ["test.jsonl", "dev/rows.jsonl.gz", "a.validation.parquet"])
def test_rows_held_out_by_their_file_never_end_in_training(tmp_path, capfd, test):
    source, deep = tmp_path / "source", "/" in test
    train = "train/rows.jsonl" if deep else "latest.jsonl"
    write(source / train, messages_of(*range(20)))
    (source / test).parent.mkdir(exist_ok=True)
    if test.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(messages_of(20, 21, 22)), source / test)
    else:
        write(source / test, messages_of(20, 21, 22))
    main(["prepare_data", "messages", f"--source={source}", f"--data_dir={tmp_path / 'out'}"])
    path = tmp_path / "out" / "messages" / "own" / "1.1.0"
    prompts = {split: [row["prompt"] for row in rows] for split, rows in everything(path).items()}
    assert prompts == {
        "train_sft": [f"Question {n}?" for n in range(20)],
        "test_sft": [f"Question {n}?" for n in (20, 21, 22)],
    }
    assert report(path)["made_from"]["splits"] == {train: "train_sft", test: "test_sft"}
    said = capfd.readouterr().err
    assert f"{test}: test_sft, by its name." in said
    how = "by its name" if deep else "as its name holds nothing out"
    assert said.index(f"{train}: train_sft, {how}.") < said.index("prepare messages")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train_test.jsonl", "a.jsonl"], r"train_test\.jsonl in .* names both .*test, .*rename"),
        (["test.jsonl"], r"held-out rows alone, by the name of test\.jsonl: .*nothing to train on"),
    ],
)
def test_names_that_leave_no_clear_split_are_refused(tmp_path, files, message):
    for at, name in enumerate(files):
        write(tmp_path / "source" / name, messages_of(at))
    source = tmp_path / "source"
    for place in (source, source / files[0]) if len(files) == 1 else (source,):
        with pytest.raises(ValueError, match=message) as stop:
            prepare("messages", place, tmp_path / "out")
        assert "\n" not in str(stop.value)


def test_a_fraction_and_a_name_cannot_both_decide_what_is_held_out(tmp_path):
    write(tmp_path / "source" / "test.jsonl", messages_of(1))
    write(tmp_path / "source" / "mine.jsonl", messages_of(2))
    with pytest.raises(ValueError, match=r"holdout=0\.2, but test\.jsonl is held out by its name"):
        prepare("messages", tmp_path / "source", tmp_path, selection=Selection(holdout=0.2))


def test_a_folder_of_folders_is_read_and_what_is_not_read_is_named(tmp_path, caplog):
    write(tmp_path / "source" / "train" / "a.jsonl", messages_of(1))
    write(tmp_path / "source" / "test" / "a.jsonl", messages_of(2))
    schema = dialogues.own_schemas()["own"]
    names = [file.name for file in find_sources(tmp_path / "source", schema).files]
    assert names == ["test/a.jsonl", "train/a.jsonl"]
    write(tmp_path / "source" / "b.jsonl", messages_of(3))
    (file,) = find_sources(tmp_path / "source", schema).files
    assert (file.name, file.split) == ("b.jsonl", None)
    write(tmp_path / "source" / "test.csv", [])
    write(tmp_path / "source" / ".cache" / "x.jsonl", messages_of(4))
    find_sources(tmp_path / "source", schema)
    assert f"Not read in {tmp_path / 'source'}: test, test.csv, train (" in caplog.text


def test_a_mistyped_path_is_not_looked_up_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("zephyr_jax.hub.fetch", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine" / "chats.jsonl", messages_of(1))
    for source, why in (
        ("mine/chat", r"did you mean mine/chats\.jsonl\?.*mine/ reads as a folder.*mine/chat@main"),
        ("mien/chats.jsonl", "it ends as the name of a file"),
        ("./mien", "does not read as org/name"),
        (r"mine\chats", "does not read as org/name"),
        ("mien", "did you mean mine"),
    ):
        with pytest.raises(FileNotFoundError, match=f"--source=.* is not a folder.*{why}") as stop:
            find_sources(source, dialogues.own_schemas()["own"])
        assert "The hub was not asked" in str(stop.value)


def test_a_prompt_in_both_published_splits_is_an_error(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft.jsonl", map(chat, range(10)))
    write(source / "test_sft.jsonl", map(chat, range(9, 12)))
    message = r"train_sft\.jsonl:10.*held-out split too.*--drop_overlap"
    with pytest.raises(ValueError, match=message):
        prepare("ultrachat", source, tmp_path, "200k")
    path = prepare("ultrachat", source, tmp_path, "200k", selection=Selection(drop_overlap=True))
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
