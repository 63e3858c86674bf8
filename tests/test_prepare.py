import argparse
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from zephyr_jax.data import prepare as station
from zephyr_jax.data import staging
from zephyr_jax.data.cleaning import CleaningRules
from zephyr_jax.data.prepare import dataset_digest, prepare, read_split
from zephyr_jax.data.rows import prompt_digest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.exists(), reason="the shared samples are not here")


def dialogue(number):
    return {"id": str(number), "data": [f"question {number}? please", f"Answer {number}."]}


def chat(number):
    prompt = f"Question {number}?"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes. é"}]
    return {"prompt": prompt, "prompt_id": prompt_digest(prompt), "messages": messages}


def rated(number):
    answers = [
        {"response": f"Answer {index}", "overall_score": 2.0 + index, "annotations": {}}
        for index in range(4)
    ]
    return {"instruction": f"Question {number}?", "source": "flan", "completions": answers}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def report(path):
    return json.loads((path / "report.json").read_text())


def everything(path):
    kept = report(path)["rows"]["kept"]
    return {split: list(read_split(path, split)) for split, rows in kept.items() if rows}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.is_file() or path.name[0] == "."]


@pytest.fixture
def raw(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(dialogue, range(50)))
    write(tmp_path / "raw" / "train_1.jsonl.gz", map(dialogue, range(50, 80)))
    return tmp_path / "raw"


def test_dialogues_arrive_cleaned_and_split(raw, tmp_path):
    path = prepare("ultrachat", raw, tmp_path / "out")
    assert path == tmp_path / "out" / "ultrachat" / "raw" / "1.0.0"
    rows = everything(path)
    assert sorted(rows) == ["test_sft", "train_sft"]
    assert 2 <= len(rows["test_sft"]) <= 16
    assert sorted(row["prompt"] for rows in rows.values() for row in rows) == sorted(
        f"Question {number}? Please" for number in range(80)
    )
    row = rows["train_sft"][0]
    assert row["prompt_id"] == prompt_digest(row["prompt"])
    assert row["messages"][0] == {"role": "user", "content": row["prompt"]}
    assert row["messages"][1]["role"] == "assistant"
    assert type(row["prompt"]) is str
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]
    assert not any(file.is_dir() for file in path.iterdir())
    assert "tensorflow" not in sys.modules


def test_the_report_tells_what_happened(raw, tmp_path):
    write(raw / "train_2.jsonl", [{"id": "x", "data": ["Q", "As an AI, no."]}, dialogue(99)])
    write(raw / "other.jsonl", [{"instruction": "?", "output": "!"}])
    told = report(prepare("ultrachat", raw, tmp_path / "out", seed=3))
    assert told["rows"]["read"] == 82
    assert sum(told["rows"]["kept"].values()) == 81
    assert told["rules"] == {"truecase": 81, "refusal": 1}
    assert told["read_by_source"] == {
        "train_0.jsonl": 50,
        "train_1.jsonl.gz": 30,
        "train_2.jsonl": 2,
    }
    assert told["made_from"]["seed"] == 3
    assert set(told["made_from"]["sources"]) == set(told["read_by_source"])
    assert "instruction, output" in told["skipped"]["other.jsonl"]
    assert told["examples"]["truecase"][0] == {
        "where": "train_0.jsonl:1",
        "before": ["question 0? please"],
        "after": ["Question 0? please".replace("? p", "? P")],
    }
    assert told["examples"]["refusal"][0]["where"] == "train_2.jsonl:1"
    assert str(tmp_path) not in json.dumps(told)


def test_the_split_hangs_on_the_prompt_alone(raw, tmp_path):
    first = everything(prepare("ultrachat", raw, tmp_path / "first"))
    shuffled = [dialogue(number) for number in reversed(range(80))] + [dialogue(5)]
    write(tmp_path / "again" / "all.jsonl", shuffled)
    second = everything(prepare("ultrachat", tmp_path / "again", tmp_path / "second"))
    for split, rows in first.items():
        assert {row["prompt_id"] for row in rows} == {row["prompt_id"] for row in second[split]}
    other = everything(prepare("ultrachat", raw, tmp_path / "third", seed=1))
    assert {row["prompt"] for row in first["test_sft"]} != {
        row["prompt"] for row in other["test_sft"]
    }


def test_digest_is_of_the_content(raw, tmp_path):
    one = prepare("ultrachat", raw, tmp_path / "one")
    os.rename(raw, tmp_path / "moved")
    two = prepare("ultrachat", tmp_path / "moved", tmp_path / "two")
    assert dataset_digest(one) == dataset_digest(two)
    rules = CleaningRules(truecase=False)
    three = prepare("ultrachat", tmp_path / "moved", tmp_path / "three", cleaning=rules)
    assert dataset_digest(three) != dataset_digest(one)


def test_rows_survive_more_shards_than_one(raw, tmp_path, monkeypatch):
    whole = everything(prepare("ultrachat", raw, tmp_path / "whole"))
    monkeypatch.setattr(staging, "SHARD_ROWS", 7)
    path = prepare("ultrachat", raw, tmp_path / "parts")
    assert len(list(path.glob("*train_sft.array_record*"))) == -(-len(whole["train_sft"]) // 7)
    assert everything(path) == whole


def test_another_process_may_be_faster(raw, tmp_path, monkeypatch):
    path = prepare("ultrachat", raw, tmp_path / "out")
    os.rename(path, tmp_path / "kept")
    real = staging.stage

    def slow(plan, directory):
        os.rename(tmp_path / "kept", path)
        return real(plan, directory)

    monkeypatch.setattr(staging, "stage", slow)
    with pytest.raises(ValueError, match="another process"):
        prepare("ultrachat", raw, tmp_path / "out")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


def test_a_second_call_returns_at_once(raw, tmp_path, monkeypatch):
    path = prepare("ultrachat", raw, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    monkeypatch.setattr(station, "_build", lambda *_, **__: pytest.fail("built again"))
    assert prepare("ultrachat", raw, tmp_path / "out") == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_another_set_is_replaced_only_on_request(raw, tmp_path):
    path = prepare("ultrachat", raw, tmp_path / "out")
    old = dataset_digest(path)
    with pytest.raises(ValueError, match=r"\(seed differ\).*--overwrite"):
        prepare("ultrachat", raw, tmp_path / "out", seed=1)
    write(raw / "train_0.jsonl", map(dialogue, range(200, 260)))
    with pytest.raises(ValueError, match=r"\(sources differ\)"):
        prepare("ultrachat", raw, tmp_path / "out")
    assert dataset_digest(path) == old
    assert prepare("ultrachat", raw, tmp_path / "out", overwrite=True) == path
    assert dataset_digest(path) != old
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_half_way_leaves_what_was_there(raw, tmp_path, monkeypatch, overwrite):
    out = tmp_path / "out"
    if overwrite:
        old = everything(prepare("ultrachat", raw, out))
    real = staging._read_shard

    def broken(path, progress):
        for number, row in real(path, progress):
            if number == 3:
                raise KeyboardInterrupt
            yield number, row

    monkeypatch.setattr(staging, "_read_shard", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare("ultrachat", raw, out, seed=9, overwrite=overwrite)
    if overwrite:
        assert everything(out / "ultrachat" / "raw" / "1.0.0") == old
    else:
        assert leftovers(out) == []


def test_bad_rows_are_counted_and_too_many_stop(raw, tmp_path):
    bad = ["{", "[]", '{"id": "1"}', '{"id": "1", "data": [1]}', '{"id": null, "data": []}']
    bad += [json.dumps({"id": "1", "data": ["\ud800", "A."]}), "", "\xff{}"]
    with (raw / "train_0.jsonl").open("ab") as file:
        file.write("\n".join(bad).encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"7 of 87 rows do not fit.*bad_json 2 \(train_0") as stop:
        prepare("ultrachat", raw, tmp_path / "out")
    assert "\n" not in str(stop.value)
    assert not leftovers(tmp_path / "out")
    told = report(prepare("ultrachat", raw, tmp_path / "out", max_bad_fraction=0.1))
    assert told["rows"]["bad"] == 7
    assert {reason: entry["count"] for reason, entry in told["bad"].items()} == {
        "bad_json": 2,
        "not_an_object": 1,
        "missing_key:data": 1,
        "wrong_type:data": 1,
        "wrong_type:id": 1,
        "lone_surrogate": 1,
    }
    assert told["bad"]["not_an_object"]["first"] == ["train_0.jsonl:52"]


def test_sources_that_do_not_fit(raw, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no folder, file or matching pattern"):
        prepare("ultrachat", tmp_path / "nowhere", out)
    with pytest.raises(FileNotFoundError, match="matching pattern"):
        prepare("ultrachat", f"{raw}/*.csv", out)
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileNotFoundError, match=r"a\.parquet"):
        prepare("ultrachat", tmp_path / "columns", out)
    with pytest.raises(ValueError, match=r"instruction, completions .*id, data"):
        prepare("ultrafeedback", raw, out)
    with pytest.raises(ValueError, match="try --config_name=raw"):
        prepare("ultrachat", raw, out, "200k")
    with pytest.raises(ValueError, match="choose one of raw, 200k"):
        prepare("ultrachat", raw, out, "300k")
    with pytest.raises(ValueError, match="ultrachat, ultrafeedback"):
        prepare("ultra", raw, out)
    with pytest.raises(ValueError, match=r"holdout=1\.5"):
        prepare("ultrachat", raw, out, holdout=1.5)
    with pytest.raises(ValueError, match="not local"):
        prepare("ultrachat", raw, "gs://bucket/data")
    damaged = raw / "train_1.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        prepare("ultrachat", raw, out)


def test_one_file_and_globs(raw, tmp_path):
    one = prepare("ultrachat", raw / "train_1.jsonl.gz", tmp_path / "one")
    assert report(one)["rows"]["read"] == 30
    write(raw / "deep" / "train_0.jsonl", [dialogue(90)])
    every = prepare("ultrachat", f"{tmp_path}/**/train_0.jsonl", tmp_path / "every")
    assert report(every)["read_by_source"] == {"deep/train_0.jsonl": 1, "train_0.jsonl": 50}


def test_holdout_and_sample(raw, tmp_path):
    rows = everything(prepare("ultrachat", raw, tmp_path / "all", holdout=0.0))
    assert {split: len(rows) for split, rows in rows.items()} == {"train_sft": 80}
    with pytest.raises(ValueError, match="no split 'test_sft'"):
        read_split(tmp_path / "all" / "ultrachat" / "raw" / "1.0.0", "test_sft")
    path = prepare("ultrachat", raw, tmp_path / "some", sample=0.5)
    told = report(path)
    assert 25 < sum(told["rows"]["kept"].values()) < 55
    assert sum(told["rows"]["kept"].values()) + told["rules"]["sampled_out"] == 80


def test_published_splits_stay(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft-00000-of-00002.jsonl", map(chat, range(10)))
    write(source / "train_sft-00001-of-00002.jsonl", map(chat, range(10, 20)))
    write(source / "test_sft-00000-of-00001.jsonl", map(chat, range(20, 25)))
    write(source / "train_gen-00000-of-00001.jsonl", map(chat, range(5)))
    write(source / "extra.jsonl", map(chat, range(3)))
    path = prepare("ultrachat", source, tmp_path / "out", "200k")
    told = report(path)
    assert told["splits_by"] == "file names"
    assert sorted(told["skipped"]) == ["extra.jsonl", "train_gen-00000-of-00001.jsonl"]
    rows = everything(path)
    assert rows["train_sft"] == [chat(number) for number in range(20)]
    assert rows["test_sft"] == [chat(number) for number in range(20, 25)]


def test_a_training_file_alone_is_split_by_prompt(tmp_path):
    source = write(tmp_path / "train_sft.jsonl", map(chat, range(80)))
    told = report(prepare("ultrachat", source, tmp_path / "out", "200k"))
    assert told["splits_by"] == "prompt_id"
    assert 2 <= told["rows"]["kept"]["test_sft"] <= 16


def test_a_prompt_in_both_published_splits_is_an_error(tmp_path):
    source = tmp_path / "source"
    write(source / "train_sft.jsonl", map(chat, range(10)))
    write(source / "test_sft.jsonl", map(chat, range(9, 12)))
    with pytest.raises(ValueError, match=r"train_sft\.jsonl:10.*test_sft too.*--drop_straddling"):
        prepare("ultrachat", source, tmp_path / "out", "200k")
    path = prepare("ultrachat", source, tmp_path / "out", "200k", drop_straddling=True)
    assert report(path)["rows"]["kept"] == {"train_sft": 9, "test_sft": 3}
    assert report(path)["rules"] == {"straddling": 1}


def test_broken_published_dialogues_are_dropped(tmp_path):
    rows = [chat(number) for number in range(40)]
    rows[0]["messages"] = rows[0]["messages"][:1]
    rows[1]["messages"][1]["content"] = " "
    rows[2]["prompt_id"] = "f00"
    told = report(prepare("ultrachat", write(tmp_path / "a.jsonl", rows), tmp_path, "200k"))
    assert told["rules"] == {"bad_roles": 1, "empty_turn": 1, "prompt_id_not_sha256": 1}
    assert sum(told["rows"]["kept"].values()) == 38


def test_ratings_become_pairs(tmp_path):
    source = write(tmp_path / "flan.jsonl", map(rated, range(60)))
    path = prepare("ultrafeedback", source, tmp_path / "out")
    rows = everything(path)
    assert sorted(rows) == ["test_prefs", "train_prefs"]
    for row in rows["train_prefs"] + rows["test_prefs"]:
        assert row["chosen"][-1] == {"role": "assistant", "content": "Answer 3"}
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["score_chosen"] == 5.0
        assert row["score_rejected"] == 2.0 + int(row["rejected"][-1]["content"][-1])
        assert row["source"] == "flan"
    assert "tensorflow" not in sys.modules


def test_the_builder_reads_a_manual_dir(raw, tmp_path):
    import tensorflow_datasets as tfds

    from zephyr_jax.data.ultrachat.builder import UltraChat

    builder = UltraChat(config="raw", data_dir=tmp_path / "tfds")
    config = tfds.download.DownloadConfig(manual_dir=raw)
    builder.download_and_prepare(download_config=config, file_format="array_record")
    assert sum(split.num_examples for split in builder.info.splits.values()) == 80
    assert everything(Path(builder.data_dir)) == everything(
        prepare("ultrachat", raw, tmp_path / "out")
    )


def test_a_split_is_a_sequence(raw, tmp_path):
    split = read_split(prepare("ultrachat", raw, tmp_path / "out"), "train_sft")
    assert split[-1] == split[len(split) - 1] == split[-2:][1]
    with pytest.raises(IndexError):
        split[len(split)]
    with pytest.raises(FileNotFoundError, match="no prepared data set"):
        read_split(tmp_path, "train_sft")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    station.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_the_command_line(raw, tmp_path):
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("Answer 7\n\n")
    there = [f"--source={raw}", f"--data_dir={tmp_path / 'out'}"]
    station.run(
        parse("ultrachat", *there, "--no_truecase", f"--refusal_phrases={phrases}", "--holdout=0")
    )
    told = report(tmp_path / "out" / "ultrachat" / "raw" / "1.0.0")
    assert told["rules"] == {"refusal": 1}
    assert told["rows"]["kept"] == {"train_sft": 79, "test_sft": 0}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["ultrachat", "--criterion=mean_rating"], "criterion"),
        (["ultrachat", "--drop_ties"], "drop_ties"),
        (["ultrafeedback", "--keep_refusals"], "keep_refusals"),
        (["ultrachat", "--config_name=200k", "--no_truecase"], "no_truecase"),
        (["ultrafeedback", "--config_name=binarized", "--no_score_repair"], "no_score_repair"),
    ],
)
def test_options_without_effect_are_errors(arguments, option):
    with pytest.raises(ValueError, match=f"--{option} has no effect on {arguments[0]}"):
        station.run(parse(*arguments, "--source=.", "--data_dir=."))


@needs_samples
def test_real_dialogues(tmp_path):
    told = report(prepare("ultrachat", SHARED, tmp_path))
    assert told["rows"]["read"] == 400
    assert sum(told["rows"]["kept"].values()) == 391
    assert told["rules"]["refusal"] == 9


@needs_samples
def test_real_pairs(tmp_path):
    path = prepare("ultrafeedback", SHARED, tmp_path, "binarized")
    told = report(path)
    assert told["rules"] == {"tie": 110, "identical_text": 4, "empty_response": 2}
    source = SHARED / "ultrafeedback_binarized_train_prefs_1000.jsonl"
    real = {row["prompt_id"]: row for row in map(json.loads, source.read_text().splitlines())}
    rows = [row for rows in everything(path).values() for row in rows]
    assert len(rows) == 994
    for row in rows:
        assert all(row[key] == real[row["prompt_id"]][key] for key in row if key != "source")


@needs_samples
def test_real_ratings(tmp_path):
    source = SHARED / "ultrafeedback_like_mtbench_320.jsonl"
    told = report(prepare("ultrafeedback", source, tmp_path))
    assert told["rows"]["read"] == 320
    # These have no aspect ratings, so nothing tells a true ten from a faulty one.
    assert told["rules"]["score_10_unrated"] == 508
    assert sum(told["rows"]["kept"].values()) + told["rules"]["identical_text"] == 320
    binarization = station.BinarizationRules(criterion="mean_rating")
    with pytest.raises(ValueError, match=r"none of the 320 rows.*too_few_scores 320"):
        prepare("ultrafeedback", source, tmp_path, binarization=binarization, overwrite=True)
