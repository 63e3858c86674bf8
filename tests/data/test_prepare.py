import argparse
import json
import re
import shutil
import subprocess
import sys

import pytest
from raw_rows import dialogue, everything, rated, report, write

from zephyr_jax.__main__ import main
from zephyr_jax.cli import prepare_data
from zephyr_jax.data.prepare import convert, records
from zephyr_jax.data.prepare.prepare import (
    DATASETS,
    Selection,
    dataset_digest,
    prepare,
    read_split,
    set_folder,
)
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.schema import prompt_digest


def all_files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_source_that_changes_while_it_is_read_is_refused(raw, tmp_path, monkeypatch):
    read = records.convert_chunk
    changed = lambda task: (task.plan.sources.files[0].path.touch(), read(task))[1]  # noqa: E731
    monkeypatch.setattr(records, "convert_chunk", changed)
    with pytest.raises(ValueError, match="was written to while it was read; prepare again"):
        prepare("ultrachat", raw, tmp_path / "out")


def test_dialogues_arrive_cleaned_and_split(raw, tmp_path):
    out = tmp_path / "o[1]*?"
    path = prepare("ultrachat", raw, out)
    assert path == set_folder(str(out), "ultrachat/raw") == out / "ultrachat" / "raw" / "1.1.0"
    rows = everything(path)
    assert sorted(rows) == ["test_sft", "train_sft"]
    assert 2 <= len(rows["test_sft"]) <= 16
    assert {row["prompt"] for rows in rows.values() for row in rows} == {
        f"Question {number}? Please" for number in range(80)
    }
    row = rows["train_sft"][0]
    number = row["prompt"].split("?")[0].split()[-1]
    messages = [{"role": "user", "content": row["prompt"]}]
    messages.append({"role": "assistant", "content": f"Answer {number}."})
    prompt_id = prompt_digest(row["prompt"])
    assert row == {"prompt": row["prompt"], "prompt_id": prompt_id, "messages": messages}
    assert len(all_files(out)) == len(list(path.iterdir()))
    assert "tensorflow" not in sys.modules


def test_the_report_counts_and_shows(raw, tmp_path):
    write(raw / "train_2.jsonl", [{"id": "x", "data": ["Q", "As an AI, no."]}, dialogue(99)])
    write(raw / "other.jsonl", [{"instruction": "?", "output": "!"}])
    result = report(prepare("ultrachat", raw, tmp_path / "out", selection=Selection(seed=3)))
    assert result["rows"]["read"] == 82
    assert sum(result["rows"]["kept"].values()) == 81
    assert result["rules"] == {"truecase": 81, "refusal": 1}
    read = {"train_0.jsonl": 50, "train_1.jsonl.gz": 30, "train_2.jsonl": 2}
    assert result["read_by_source"] == read
    assert result["made_from"]["selection"]["seed"] == 3
    assert set(result["made_from"]["sources"]) == set(result["read_by_source"])
    assert "instruction, output" in result["skipped"]["other.jsonl"]
    assert result["examples"]["truecase"][0] == {
        "where": "train_0.jsonl:1",
        "before": ["user: question 0? please"],
        "after": ["user: Question 0? Please"],
    }
    assert result["examples"]["refusal"][0]["where"] == "train_2.jsonl:1"
    assert str(tmp_path) not in json.dumps(result)


def test_the_split_depends_on_the_prompt_alone(raw, tmp_path):
    first = everything(prepare("ultrachat", raw, tmp_path / "first"))
    shuffled = [dialogue(number) for number in reversed(range(80))] + [dialogue(5)]
    write(tmp_path / "again" / "all.jsonl", shuffled)
    second = everything(prepare("ultrachat", tmp_path / "again", tmp_path / "second"))
    other = everything(prepare("ultrachat", raw, tmp_path / "third", selection=Selection(seed=1)))
    held_out = {row["prompt_id"] for row in first["test_sft"]}
    assert {row["prompt_id"] for row in second["test_sft"]} == held_out
    assert {row["prompt_id"] for row in other["test_sft"]} != held_out
    assert {row["prompt_id"] for row in second["train_sft"]}.isdisjoint(held_out)


def test_rows_survive_more_shards_than_one(raw, tmp_path, monkeypatch):
    whole = everything(prepare("ultrachat", raw, tmp_path / "whole"))
    monkeypatch.setattr(records, "SHARD_BYTES", 1500)
    path = prepare("ultrachat", raw, tmp_path / "parts")
    assert len(list(path.glob("*train_sft.array_record*"))) > 4
    assert everything(path) == whole


def test_another_set_is_replaced_only_on_request(raw, tmp_path):
    path = prepare("ultrachat", raw, tmp_path / "out")
    old, files = dataset_digest(path), all_files(tmp_path / "out")
    raw = raw.rename(tmp_path / "moved")
    assert prepare("ultrachat", raw, tmp_path / "out") == path
    with pytest.raises(ValueError, match=r"\(selection differ\).*--overwrite"):
        prepare("ultrachat", raw, tmp_path / "out", selection=Selection(seed=1))
    write(raw / "train_0.jsonl", map(dialogue, range(200, 260)))
    with pytest.raises(ValueError, match=r"\(sources differ\)"):
        prepare("ultrachat", raw, tmp_path / "out")
    assert dataset_digest(path) == old
    assert prepare("ultrachat", raw, tmp_path / "out", overwrite=True) == path
    assert dataset_digest(path) != old
    assert all_files(tmp_path / "out") == files


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_leaves_what_was_there(raw, tmp_path, monkeypatch, overwrite):
    out = tmp_path / "out"
    if overwrite:
        prepare("ultrachat", raw, out)
    before = {path: (out / path).read_bytes() for path in all_files(out)}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "make_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("ultrachat", raw, out, selection=Selection(seed=9), overwrite=overwrite)
    assert {path: (out / path).read_bytes() for path in all_files(out)} == before


def test_a_damaged_set_is_named_and_prepared_again(raw, tmp_path, caplog, refused):
    whole = prepare("ultrachat", raw, tmp_path / "out")
    (shard,) = whole.glob("*test_sft*")
    shard.write_bytes(shard.read_bytes()[:-1])
    words = ["prepare_data", "ultrachat", f"--source={raw}", f"--data_dir={tmp_path / 'out'}"]
    assert f"{shard.name} is damaged" in refused(*words)
    main([*words, "--overwrite"])
    (shard,), rows = whole.glob("*test_sft*"), read_split(whole, "test_sft")
    assert len(rows[:]) > 0
    sound = shard.read_bytes()
    shard.write_bytes(sound[:500] + bytes(len(sound) - 1000) + sound[-500:])
    with pytest.raises(OSError, match=f"{whole}: .*; prepare the set again, with --overwrite"):
        rows[:]  # which were whole at the start
    shard.write_bytes(sound)
    (whole / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"digests.json is missing, so nothing in .* --overwrite"):
        read_split(whole, "test_sft")
    copy = shutil.copytree(whole, tmp_path / "old")  # as written by 0.1.0
    (copy / "report.json").write_text((copy / "report.json").read_text().replace('"sealed"', '"-"'))
    assert read_split(copy, "test_sft")[0]["messages"]
    assert caplog.text.count("has no digests.json, so its files are not checked") == 1


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_told_in_one_line_with_the_bytes(raw, tmp_path, monkeypatch, refused, words):
    def full(*_):
        raise RuntimeError(f"write() failed: {words}; writing x\nat byte 262144")

    monkeypatch.setattr(records, "ArrayRecordWriter", full)
    out = tmp_path / "out"
    said = refused("prepare_data", "ultrachat", f"--source={raw}", f"--data_dir={out}")
    assert re.search(r"no space is left for /.*: about [\d,]+ bytes are needed, [\d,]+ were", said)
    assert not all_files(out)


def test_a_split_is_a_sequence(raw, tmp_path):
    split = read_split(prepare("ultrachat", raw, tmp_path / "out"), "train_sft")
    assert split[-1] == split[len(split) - 1] == split[-2:][1]
    with pytest.raises(IndexError):
        split[len(split)]
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        read_split(tmp_path, "train_sft")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    prepare_data.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_the_command_line(raw, tmp_path):
    write(raw / "train_2.jsonl", [{"id": "x", "data": ["Q", "As an AI, no."]}])
    words = [f"--source={raw}", f"--data_dir={tmp_path}", "--rows=71,9", "--clean=refusals"]
    prepare_data.run(parse("ultrachat", *words))
    result = report(tmp_path / "ultrachat" / "raw" / "1.1.0")
    assert result["rules"] == {"refusal": 1}
    assert result["rows"]["kept"] == {"train_sft": 71, "test_sft": 9}


def test_options_reach_the_plan(tmp_path):
    (tmp_path / "own.txt").write_text("no way\n\n never \n")
    options = {"sample": 0.5, "ngram": 8, "max_turns": 4}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--refusal_phrases={tmp_path / 'own.txt'}", "--source=.", "--data_dir=."]
    more = ["--clean=refusals", "--decontaminate=bench.jsonl"]
    plan = prepare_data.plan_of(parse("messages", *flags, *more))
    assert plan["selection"] == Selection(**options, decontaminate=("bench.jsonl",))
    assert plan["rules"] == CleaningRules(False, True, ("no way", "never"))
    for lacking, option in zip(more, ("refusal_phrases", "ngram"), strict=True):
        with pytest.raises(ValueError, match=rf"--{option}.* has no effect without {lacking[:7]}"):
            prepare_data.plan_of(parse("messages", *flags, *{*more} - {lacking}))


@pytest.mark.parametrize("words", ["ultrachat --ties=drop", "ultrachat --config_name=200k --clean"])
def test_options_without_effect_are_errors(words):
    option = words.split("--")[-1].split("=")[0]
    with pytest.raises(ValueError, match=f"--{option} has no effect on ultrachat"):
        prepare_data.run(parse(*words.split(), "--source=.", "--data_dir=."))


TFDS_ALONE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("zephyr_jax", "jax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import tensorflow_datasets as tfds

rows = []
for path in sys.argv[1:]:
    builder = tfds.builder_from_directory(path)
    split = next(split for split in builder.info.splits if split.startswith("train"))
    records = builder.as_data_source(split)
    prompt = records[len(records) - 1]["prompt"].decode()
    rows.append([len(records), prompt, builder.info.citation, builder.info.name])
print(json.dumps(rows))
"""
ROWS = {
    "ultrachat": dialogue,
    "ultrafeedback": rated,
    "messages": lambda n: {"instruction": f"Do {n}", "output": f"Done {n}."},
    "preferences": lambda n: {"prompt": f"Do {n}", "chosen": f"Done {n}.", "rejected": "No."},
    "unpaired": lambda n: {"prompt": f"Do {n}", "completion": f"Done {n}.", "label": n % 2 == 0},
}


def test_a_program_with_tfds_alone_reads_every_set(tmp_path):
    paths = []
    for dataset in DATASETS:
        source = write(tmp_path / f"{dataset}.jsonl", map(ROWS[dataset], range(40)))
        name = "mine" if DATASETS[dataset].default == "own" else None
        paths.append(prepare(dataset, source, tmp_path / "out", name))
    command = [sys.executable, "-c", TFDS_ALONE, *paths]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True, text=True)
    results = json.loads(done.stdout.splitlines()[-1])
    for dataset, (rows, prompt, citation, name) in zip(DATASETS, results, strict=True):
        assert 25 < rows < 40
        assert prompt.startswith(("Question ", "Do "))
        assert name == dataset
        assert citation.startswith("@inproceedings") == dataset.startswith("ultra")
