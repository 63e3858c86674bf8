"""The stages of conversion: any cut and any number of workers, kills, duplicates, exact sizes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from raw_rows import chat, everything, report, write

from zephyr_jax.data.prepare import convert
from zephyr_jax.data.prepare.plan import Selection
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.raw import readers
from zephyr_jax.data.raw.filters import Filters

WORDS = [
    "river",
    "stone",
    "cloud",
    "paper",
    "seven",
    "green",
    "apple",
    "window",
    "honest",
    "travel",
    "music",
    "winter",
]


def long_dialogue(number):
    rng = random.Random(number)
    said = " ".join(rng.choices(WORDS, k=40))
    return {"id": str(number), "data": [f"{number} {said}?", f"{said}. and so on."]}


def files_of(path):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())
    }


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a kilobyte: the default of `chunks_of` was bound when it was defined."""
    monkeypatch.setattr(convert, "chunks_of", lambda path: readers.chunks_of(path, 1000))


@pytest.fixture
def raw(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(long_dialogue, range(60)))
    write(tmp_path / "raw" / "train_1.jsonl.gz", map(long_dialogue, range(60, 90)))
    return tmp_path / "raw"


def test_neither_cuts_nor_workers_show(raw, tmp_path, small_chunks, monkeypatch):
    cut = prepare("ultrachat", raw, tmp_path / "cut")
    told = report(cut)
    places = {e["where"] for e in told["examples"]["truecase"]}
    assert places == {"train_0.jsonl:1", "train_0.jsonl:2", "train_0.jsonl:3"}
    monkeypatch.undo()
    whole = prepare("ultrachat", raw, tmp_path / "whole", workers=1)
    several = prepare("ultrachat", raw, tmp_path / "several", workers=3)
    assert files_of(cut) == files_of(whole) == files_of(several)
    assert told["rows"]["read"] == 90


def test_rules_are_counted_by_split(raw, tmp_path):
    told = report(prepare("ultrachat", raw, tmp_path / "out", selection=Selection(sample=0.5)))
    by_split, kept = told["rules_by_split"]["truecase"], told["rows"]["kept"]
    assert by_split == kept | {"sampled_out": told["rules"]["sampled_out"]}
    example = told["examples"]["sampled_out"][0]
    assert example["after"] is None
    assert example["split"] is None
    file, line = example["where"].split(":")
    number = int(line) - 1 + 60 * (file == "train_1.jsonl.gz")
    assert example["before"][0][:60] == long_dialogue(number)["data"][0].capitalize()[:60]


def test_exact_sizes_by_whole_prompts(raw, tmp_path):
    rows = [long_dialogue(number) for number in range(60)]
    write(raw / "train_2.jsonl", [row | {"data": row["data"] * 2} for row in rows[:20]])
    told = report(prepare("ultrachat", raw, tmp_path / "out", selection=Selection(rows=(41, 13))))
    assert told["rows"]["kept"] == {"train_sft": 41, "test_sft": 13}
    assert told["rules"]["sampled_out"] == 110 - 54
    rows = everything(tmp_path / "out" / "ultrachat" / "raw" / "1.0.0")
    assert not {r["prompt_id"] for r in rows["train_sft"]} & {
        r["prompt_id"] for r in rows["test_sft"]
    }
    with pytest.raises(ValueError, match=r"rows wants 120 .* training, but only"):
        prepare("ultrachat", raw, tmp_path / "more", selection=Selection(rows=(120, 1)))
    with pytest.raises(ValueError, match="give one of them"):
        Selection(rows=(1, 1), sample=0.5)


def test_duplicates(raw, tmp_path):
    again = [long_dialogue(3), long_dialogue(70)]
    near = long_dialogue(5)
    near["data"][0] = near["data"][0].upper().replace("?", " !?")
    write(raw / "train_2.jsonl", [*again, near, long_dialogue(200)])
    kept = {}
    for duplicates in ("keep", "exact", "near"):
        selection = Selection(duplicates=duplicates, near_threshold=0.8)
        told = report(prepare("ultrachat", raw, tmp_path / duplicates, selection=selection))
        kept[duplicates] = sum(told["rows"]["kept"].values())
    assert kept == {"keep": 94, "exact": 92, "near": 91}
    assert told["rules"]["duplicate_prompt"] == 2
    assert told["rules"]["near_duplicate_prompt"] == 1
    first = told["examples"]["duplicate_prompt"][0]
    assert first["where"] == "train_2.jsonl:1"
    assert first["before"][1].startswith("as train_0.jsonl:4: 3 ")
    assert told["examples"]["near_duplicate_prompt"][0]["before"][1].startswith(
        "as train_0.jsonl:6"
    )


def test_held_out_rows_win_over_training_rows(tmp_path):
    source = tmp_path / "source"
    long = [chat(f"{number} {' '.join(WORDS)}") for number in range(30)]
    near = chat(f"29 {' '.join(WORDS)} ")
    write(source / "train_sft.jsonl", [*long[:20], near])
    write(source / "test_sft.jsonl", long[20:])
    selection = Selection(duplicates="near", near_threshold=0.99)
    told = report(prepare("ultrachat", source, tmp_path / "out", "200k", selection=selection))
    assert told["rows"]["kept"] == {"train_sft": 20, "test_sft": 10}
    assert told["examples"]["near_duplicate_prompt"][0]["where"] == "train_sft.jsonl:21"


def test_filters_drop_and_tell(raw, tmp_path):
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"instruction": long_dialogue(7)["data"][0]}) + "\n")
    filters = Filters(decontaminate=(str(bench),))
    path = prepare("ultrachat", raw, tmp_path / "out", filters=filters)
    told = report(path)
    assert told["rules"]["contaminated"] == 1
    assert told["examples"]["contaminated"][0]["where"] == "train_0.jsonl:8"
    assert told["examples"]["contaminated"][0]["before"][0] == "bench.jsonl"
    assert str(tmp_path) not in json.dumps(told)
    os.rename(bench, tmp_path / "moved")  # the set is known by what the file holds
    (tmp_path / "deep").mkdir()
    os.rename(tmp_path / "moved", tmp_path / "deep" / "bench.jsonl")
    filters = Filters(decontaminate=(str(tmp_path / "deep" / "bench.jsonl"),))
    assert prepare("ultrachat", raw, tmp_path / "out", filters=filters) == path


def start(raw, out):
    words = ["ultrachat", f"--source={raw}", f"--data_dir={out}", "--workers=2"]
    command = [sys.executable, "-c", SMALL_CHUNKS, *words]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


# What the command line does, on chunks and shards so small that there are many of them.
SMALL_CHUNKS = """
import sys
from zephyr_jax.data.prepare import convert, shards
from zephyr_jax.data.raw import readers
from zephyr_jax.__main__ import main

def chunks(path):
    return readers.chunks_of(path, 2000)

if __name__ == "__main__":
    convert.chunks_of, shards.SHARD_BYTES = chunks, 20_000
    main(["prepare_data", *sys.argv[1:]])
"""


def finish(raw, out):
    assert start(raw, out).wait(timeout=120) == 0
    return files_of(out / "ultrachat" / "raw" / "1.0.0")


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(long_dialogue, range(3000)))
    began = time.monotonic()
    undisturbed = finish(tmp_path / "raw", tmp_path / "whole")
    takes = time.monotonic() - began
    rng, hit = np.random.default_rng(0), 0
    for kill in range(20):
        out = tmp_path / f"out{kill}"
        process = start(tmp_path / "raw", out)
        time.sleep(takes * rng.uniform(0.1, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        hit += process.wait() == -signal.SIGKILL
        final = out / "ultrachat" / "raw" / "1.0.0"
        assert not final.exists() or files_of(final) == undisturbed
        assert finish(tmp_path / "raw", out) == undisturbed
        assert [child.name for child in out.iterdir()] == ["ultrachat"]
    assert hit >= 10


def test_one_kill_and_on(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(long_dialogue, range(600)))
    undisturbed = finish(tmp_path / "raw", tmp_path / "whole")
    out = tmp_path / "out"
    process = start(tmp_path / "raw", out)
    while not any(Path(out).glob(".preparing/*/staged/*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "ultrachat").exists()
    assert finish(tmp_path / "raw", out) == undisturbed
