import argparse
import json
import os
import sys
from pathlib import Path

import pytest
from raw_rows import dialogue, everything, rated, report, write, write_raw

from zephyr_jax.cli import prepare_data
from zephyr_jax.data.prepare import convert, shards, stages
from zephyr_jax.data.prepare import prepare as station
from zephyr_jax.data.prepare.plan import Selection
from zephyr_jax.data.prepare.prepare import dataset_digest, prepare, read_split
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.schema import prompt_digest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.exists(), reason="the shared samples are not here")


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


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
    told = report(prepare("ultrachat", raw, tmp_path / "out", selection=Selection(seed=3)))
    assert told["rows"]["read"] == 82
    assert sum(told["rows"]["kept"].values()) == 81
    assert told["rules"] == {"truecase": 81, "refusal": 1}
    assert told["read_by_source"] == {
        "train_0.jsonl": 50,
        "train_1.jsonl.gz": 30,
        "train_2.jsonl": 2,
    }
    assert told["made_from"]["selection"]["seed"] == 3
    assert set(told["made_from"]["sources"]) == set(told["read_by_source"])
    assert "instruction, output" in told["skipped"]["other.jsonl"]
    assert told["examples"]["truecase"][0] == {
        "where": "train_0.jsonl:1",
        "split": told["examples"]["truecase"][0]["split"],
        "before": ["question 0? please"],
        "after": ["Question 0? Please"],
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
    other = everything(prepare("ultrachat", raw, tmp_path / "third", selection=Selection(seed=1)))
    assert {row["prompt"] for row in first["test_sft"]} != {
        row["prompt"] for row in other["test_sft"]
    }


def test_digest_is_of_the_content(raw, tmp_path):
    one = prepare("ultrachat", raw, tmp_path / "one")
    os.rename(raw, tmp_path / "moved")
    two = prepare("ultrachat", tmp_path / "moved", tmp_path / "two")
    assert dataset_digest(one) == dataset_digest(two)
    rules = CleaningRules(truecase=False)
    three = prepare("ultrachat", tmp_path / "moved", tmp_path / "three", rules=rules)
    assert dataset_digest(three) != dataset_digest(one)


def test_rows_survive_more_shards_than_one(raw, tmp_path, monkeypatch):
    whole = everything(prepare("ultrachat", raw, tmp_path / "whole"))
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    path = prepare("ultrachat", raw, tmp_path / "parts")
    assert len(list(path.glob("*train_sft.array_record*"))) > 4
    assert everything(path) == whole


def test_another_process_may_be_faster(raw, tmp_path, monkeypatch):
    path = prepare("ultrachat", raw, tmp_path / "out")
    os.rename(path, tmp_path / "kept")
    real = stages.make

    def slow(*arguments):
        os.rename(tmp_path / "kept", path)
        return real(*arguments)

    monkeypatch.setattr(stages, "make", slow)
    with pytest.raises(ValueError, match="another process"):
        prepare("ultrachat", raw, tmp_path / "out")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


def test_one_set_is_not_made_twice_at_once(raw, tmp_path, monkeypatch):
    def meanwhile(*_):
        monkeypatch.setattr(stages, "make", real)
        with pytest.raises(ValueError, match="another process is making this very set"):
            prepare("ultrachat", raw, tmp_path / "out")
        prepare("ultrachat", raw, tmp_path / "out", selection=Selection(seed=1))
        raise KeyboardInterrupt

    real = stages.make
    monkeypatch.setattr(stages, "make", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare("ultrachat", raw, tmp_path / "out")
    assert report(tmp_path / "out" / "ultrachat" / "raw" / "1.0.0")["made_from"]["selection"][
        "seed"
    ]


def test_a_second_call_returns_at_once(raw, tmp_path, monkeypatch):
    path = prepare("ultrachat", raw, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    monkeypatch.setattr(station, "_build", lambda *_, **__: pytest.fail("built again"))
    assert prepare("ultrachat", raw, tmp_path / "out") == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_leftovers_of_a_finished_set_are_swept(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(station.shutil, "rmtree", lambda *_, **__: None)
    prepare("ultrachat", raw, tmp_path / "out")
    assert (tmp_path / "out" / ".preparing").exists()
    monkeypatch.undo()
    prepare("ultrachat", raw, tmp_path / "out")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["ultrachat"]


def test_another_set_is_replaced_only_on_request(raw, tmp_path):
    path = prepare("ultrachat", raw, tmp_path / "out")
    old = dataset_digest(path)
    with pytest.raises(ValueError, match=r"\(selection differ\).*--overwrite"):
        prepare("ultrachat", raw, tmp_path / "out", selection=Selection(seed=1))
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
    real = shards.write_shard

    def broken(task):
        if task.split == "test_sft":
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(stages, "write_shard", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare("ultrachat", raw, out, selection=Selection(seed=9), overwrite=overwrite)
    if overwrite:
        assert everything(out / "ultrachat" / "raw" / "1.0.0") == old
    else:
        assert [child.name for child in out.iterdir()] == [".preparing"]
    monkeypatch.setattr(stages, "write_shard", real)
    monkeypatch.setattr(convert, "_Conversion", lambda _: pytest.fail("converted again"))
    prepare("ultrachat", raw, out, selection=Selection(seed=9), overwrite=overwrite)
    assert [child.name for child in out.iterdir()] == ["ultrachat"]


def test_holdout_and_sample(raw, tmp_path):
    rows = everything(prepare("ultrachat", raw, tmp_path / "all", selection=Selection(holdout=0.0)))
    assert {split: len(rows) for split, rows in rows.items()} == {"train_sft": 80}
    with pytest.raises(ValueError, match="no split 'test_sft'"):
        read_split(tmp_path / "all" / "ultrachat" / "raw" / "1.0.0", "test_sft")
    path = prepare("ultrachat", raw, tmp_path / "some", selection=Selection(sample=0.5))
    told = report(path)
    assert 25 < sum(told["rows"]["kept"].values()) < 55
    assert sum(told["rows"]["kept"].values()) + told["rules"]["sampled_out"] == 80


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
    prepare_data.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_the_command_line(raw, tmp_path):
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("Answer 7\n\n")
    there = [f"--source={raw}", f"--data_dir={tmp_path / 'out'}"]
    prepare_data.run(
        parse("ultrachat", *there, "--no_truecase", f"--refusal_phrases={phrases}", "--holdout=0")
    )
    told = report(tmp_path / "out" / "ultrachat" / "raw" / "1.0.0")
    assert told["rules"] == {"refusal": 1}
    assert told["rows"]["kept"] == {"train_sft": 79, "test_sft": 0}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["ultrachat", "--criterion=mean_rating"], "criterion"),
        (["ultrachat", "--ties=drop"], "ties"),
        (["ultrafeedback", "--keep_refusals"], "keep_refusals"),
        (["ultrachat", "--config_name=200k", "--no_truecase"], "no_truecase"),
        (["ultrafeedback", "--config_name=binarized", "--no_score_repair"], "no_score_repair"),
    ],
)
def test_options_without_effect_are_errors(arguments, option):
    with pytest.raises(ValueError, match=f"--{option} has no effect on {arguments[0]}"):
        prepare_data.run(parse(*arguments, "--source=.", "--data_dir=."))


def assert_accounted(told):
    rows, undecided = told["rows"], ("straddling", "duplicate_prompt", "sampled_out")
    assert rows["read"] == rows["bad"] + rows["dropped"] + rows["records"]
    left_out = sum(told["rules"].get(rule, 0) for rule in undecided)
    assert rows["records"] == sum(rows["kept"].values()) + left_out


@needs_samples
def test_real_dialogues(tmp_path):
    told = report(prepare("ultrachat", SHARED, tmp_path))
    assert told["rows"]["read"] == 400
    assert sum(told["rows"]["kept"].values()) == 391
    assert told["rules"]["refusal"] == 9
    assert_accounted(told)
    selection = Selection(sample=0.5, duplicates="exact")
    told = report(prepare("ultrachat", SHARED, tmp_path / "half", selection=selection))
    assert told["rules"]["duplicate_prompt"] > 300  # five models answered each of 80 questions
    assert_accounted(told)


@needs_samples
def test_real_pairs(tmp_path):
    path = prepare("ultrafeedback", SHARED, tmp_path, "binarized")
    told = report(path)
    assert told["rules"] == {"tie": 110, "identical_text": 4, "empty_response": 2}
    assert_accounted(told)
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
    assert sum(told["rows"]["kept"].values()) + told["rules"].get("identical_text", 0) == 320
    by_mean = BinarizationRules(criterion="mean_rating")
    with pytest.raises(ValueError, match=r"none of the 320 rows.*too_few_scores 320"):
        prepare("ultrafeedback", source, tmp_path, rules=by_mean, overwrite=True)
