"""From chunks to shards: any cut, any number of workers, splits, duplicates, exact sizes."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from raw_rows import chat, dialogue, everything, messages, rated, report, write

from zephyr_jax.data.prepare import records
from zephyr_jax.data.prepare.convert import convert_row, example_of
from zephyr_jax.data.prepare.prepare import Selection, make_plan, prepare
from zephyr_jax.data.raw import readers
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.dialogues import own_schemas

WORDS = ["river", "stone", "cloud", "paper", "seven", "green", "apple", "window", "honest", "music"]


def long_dialogue(number):
    text = " ".join(random.Random(number).choices(WORDS, k=40))
    return {"id": str(number), "data": [f"{number} {text}?", f"{text}. and so on."]}


def files_of(path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


@pytest.fixture
def raw(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(long_dialogue, range(60)))
    write(tmp_path / "raw" / "train_1.jsonl.gz", map(long_dialogue, range(60, 90)))
    return tmp_path / "raw"


def test_chunks_and_workers_do_not_change_the_bytes(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "chunks_of", lambda path: readers.chunks_of(path, 1000))
    cut = prepare("ultrachat", raw, tmp_path / "cut")
    places = {example["where"] for example in report(cut)["examples"]["truecase"]}
    assert places == {"train_0.jsonl:1", "train_0.jsonl:2", "train_0.jsonl:3"}
    several = prepare("ultrachat", raw, tmp_path / "several", workers=2)
    monkeypatch.undo()
    whole = prepare("ultrachat", raw, tmp_path / "whole", workers=1)
    assert files_of(cut) == files_of(whole) == files_of(several)


def test_one_row_is_converted_by_itself_with_reasons(raw):
    plan = make_plan("ultrachat", raw, selection=Selection(max_chars=30))

    def outcome(row):
        return convert_row(plan, (), row)

    kept = outcome(dialogue(1))
    assert kept.records[0]["prompt"] == "Question 1? Please"
    texts = ["user: question 1? please"], ["user: Question 1? Please"]
    assert example_of(plan.schema, dialogue(1), kept, "truecase") == texts
    dropped = outcome(long_dialogue(1))
    assert not dropped.records
    assert dropped.rules == {"truecase": 1, "too_long": 1}
    before, after = example_of(plan.schema, long_dialogue(1), dropped, "too_long")
    assert (before[0][:8], after) == ("user: 1 ", None)
    assert outcome("bad_json").unfit == "bad_json"
    assert outcome({"id": 1}).unfit == "missing_key:data"
    assert outcome({"id": 1, "data": ["\ud800", "So."]}).unfit == "lone_surrogate"
    deep = functools.reduce(lambda inner, _: [inner], range(1000), [])
    row = {"messages": [*messages("Why?"), {"role": "assistant", "tool_calls": [{"a": deep}]}]}
    plan = dataclasses.replace(plan, schema=own_schemas()["own"])
    assert outcome(row).unfit == "too_deep"


def test_exact_sizes_take_complete_prompts(raw, tmp_path):
    rows = [long_dialogue(number) for number in range(20)]
    write(raw / "train_2.jsonl", [row | {"data": row["data"] * 2} for row in rows])
    path = prepare("ultrachat", raw, tmp_path / "out", selection=Selection(rows=(41, 13)))
    result = report(path)
    assert result["rows"]["kept"] == {"train_sft": 41, "test_sft": 13}
    assert result["rules"]["sampled_out"] == 110 - 54
    assert result["examples"]["sampled_out"][0]["where"].startswith("train_")
    ids = {split: {row["prompt_id"] for row in rows} for split, rows in everything(path).items()}
    assert not ids["train_sft"] & ids["test_sft"]
    with pytest.raises(ValueError, match=r"rows=120 for training .*: 1\d are missing"):
        prepare("ultrachat", raw, tmp_path / "more", selection=Selection(rows=(120, 1)))
    result = report(prepare("ultrachat", raw, tmp_path / "half", selection=Selection(sample=0.5)))
    kept = sum(result["rows"]["kept"].values())
    assert 35 < kept < 75
    assert result["rules"]["sampled_out"] == 110 - kept


def test_impossible_selections_are_refused():
    for message, options in {
        "TRAINING,HELD_OUT": {"rows": (0, 1)},
        r"holdout=1\.0 must be a fraction": {"holdout": 1.0},
        r"sample=0\.0 must be above 0": {"sample": 0.0},
        r"rows=\(1, 1\) must be .* without holdout and sample": {"sample": 0.5, "rows": (1, 1)},
        "ngram=3 must be at least 4": {"ngram": 3},
        "keep, exact, near": {"duplicates": "all"},
    }.items():
        with pytest.raises(ValueError, match=message):
            Selection(**options)


def test_duplicate_prompts_are_dropped_and_shown(raw, tmp_path):
    near = long_dialogue(5)
    near["data"][0] = near["data"][0].upper().replace("?", " !?")
    write(raw / "train_2.jsonl", [long_dialogue(3), long_dialogue(70), near, long_dialogue(200)])
    result = {}
    for duplicates, kept in {"keep": 94, "exact": 92, "near": 91}.items():
        selection = Selection(duplicates=duplicates)
        result = report(prepare("ultrachat", raw, tmp_path / duplicates, selection=selection))
        assert sum(result["rows"]["kept"].values()) == kept
    assert result["rules"]["duplicate_prompt"] == 2
    assert result["rules"]["near_duplicate_prompt"] == 1
    first = result["examples"]["duplicate_prompt"][0]
    assert first["where"] == "train_2.jsonl:1"
    assert first["before"][1].startswith("as train_0.jsonl:4: 3 ")
    near = result["examples"]["near_duplicate_prompt"][0]
    assert near["before"][1].startswith("as train_0.jsonl:6")


def test_all_pairs_of_a_row_share_its_fate(tmp_path):
    source = write(tmp_path / "flan.jsonl", map(rated, (0, 1, 0)))
    rules, selection = BinarizationRules(pairing="all"), Selection(duplicates="near", holdout=0)
    path = prepare("ultrafeedback", source, tmp_path, rules=rules, selection=selection)
    assert report(path)["rules"] == {"duplicate_prompt": 6}
    rows = everything(path)["train_prefs"]
    assert len(rows) == 12
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"score_{side}"] == 2.0 + int(row[side][-1]["content"][-1])


def test_a_training_row_is_the_one_dropped_of_near_duplicates_in_two_splits(tmp_path):
    rows = [chat(f"{number} " * 5) for number in range(30)]
    write(tmp_path / "raw" / "train_sft.jsonl", [*rows[:20], chat("29 ! " * 5)])
    write(tmp_path / "raw" / "test_sft.jsonl", rows[20:])
    selection = Selection(duplicates="near")
    path = prepare("ultrachat", tmp_path / "raw", tmp_path / "out", "200k", selection=selection)
    assert report(path)["rows"]["kept"] == {"train_sft": 20, "test_sft": 10}
    assert report(path)["examples"]["near_duplicate_prompt"][0]["where"] == "train_sft.jsonl:21"


def test_contaminated_records_are_dropped_and_shown(raw, tmp_path):
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"instruction": long_dialogue(7)["data"][0]}) + "\n")
    selection = Selection(decontaminate=(str(bench),))
    path = prepare("ultrachat", raw, tmp_path / "out", selection=selection)
    result = report(path)
    assert result["rules"]["contaminated"] == 1
    [example] = result["examples"]["contaminated"]
    assert (example["where"], example["before"][0]) == ("train_0.jsonl:8", "bench.jsonl")
    assert str(tmp_path) not in json.dumps(result)
    (tmp_path / "deep").mkdir()  # the content of the file counts, not its place
    os.rename(bench, tmp_path / "deep" / "bench.jsonl")
    selection = Selection(decontaminate=(str(tmp_path / "deep" / "bench.jsonl"),))
    assert prepare("ultrachat", raw, tmp_path / "out", selection=selection) == path


def test_workers_end_with_a_killed_parent(tmp_path):
    run = "    run_tasks(time.sleep, [0.1, 600, 600], 2, 'sleep')\n"
    imports = "import time\nfrom zephyr_jax.data.prepare.convert import run_tasks\n"
    (tmp_path / "parent.py").write_text(f"{imports}if __name__ == '__main__':\n{run}")
    command = [sys.executable, tmp_path / "parent.py"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert isinstance(parent.stderr, io.BufferedReader)
    while b"1/3" not in parent.stderr.read1():  # the first sleep is over, the others go on
        assert parent.poll() is None
    parent.kill()
    parent.communicate(timeout=60)  # until the last process that holds the other end is gone


def test_records_are_serialized_as_by_tfds():
    turns = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": ""}]
    tool = {"role": "tool", "content": "5", "name": "add", "train": False}
    named = {"prompt": "Grüße?", "prompt_id": "7"}
    scores = {"score_chosen": 8.5, "score_rejected": 3, "source": ""}
    for kind, record in (
        ("dialogue", named | {"messages": [*turns, tool]}),
        ("pair", named | {"chosen": turns, "rejected": turns[:1], **scores}),
        ("unpaired", named | {"messages": turns, "label": True, "source": "x"}),
    ):
        features = records.FEATURES[kind]
        whole = records.stored(record) if kind == "dialogue" else record
        encoder = tfds.core.ExampleSerializer(features.get_serialized_info())
        example = encoder.get_tf_example(features.encode_example(whole))
        assert records.serialize(record) == example.SerializeToString(deterministic=True)
