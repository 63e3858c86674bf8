"""The sets are TFDS sets: others read them without our code, and find what belongs to a set."""

import importlib
import json
import subprocess
import sys

import pytest
from raw_rows import dialogue, rated, write
from tensorflow_datasets.core import dataset_metadata

from zephyr_jax.data.prepare.prepare import DATASETS, prepare

STRANGER = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("zephyr_jax", "jax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import tensorflow_datasets as tfds

builder = tfds.builder_from_directory(sys.argv[1])
rows = builder.as_data_source("train_sft" if "messages" in builder.info.features else "train_prefs")
row = rows[len(rows) - 1]
print(json.dumps([len(rows), row["prompt"].decode(), builder.info.citation, builder.info.name]))
"""
"""Reads a set as a program does that has TFDS alone."""

SOURCES = {
    "ultrachat": [dialogue(n) for n in range(40)],
    "ultrafeedback": [rated(n) for n in range(40)],
    "messages": [{"instruction": f"Do {n}", "output": f"Done {n}."} for n in range(40)],
    "preferences": [
        {"prompt": f"Do {n}", "chosen": f"Done {n}.", "rejected": "No."} for n in range(40)
    ],
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_stranger_reads_it(dataset, tmp_path):
    write(tmp_path / "rows.jsonl", SOURCES[dataset])
    name = None if dataset.startswith("ultra") else "mine"
    path = prepare(dataset, tmp_path / "rows.jsonl", tmp_path / "out", name)
    command = [sys.executable, "-c", STRANGER, path]
    said = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True, text=True)
    rows, prompt, citation, named = json.loads(said.stdout.splitlines()[-1])
    assert 25 < rows < 40
    assert prompt.startswith(("Question ", "Do "))
    assert named == dataset
    assert citation.startswith("@inproceedings") == dataset.startswith("ultra")


@pytest.mark.parametrize(
    "folder", ["ultrachat", "ultrafeedback", "own_messages", "own_preferences"]
)
def test_description_and_tags_stand_beside_each_builder(folder):
    module = importlib.import_module(f"zephyr_jax.data.{folder}.builder")
    classes = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    (builder,) = (c for c in classes if isinstance(c, type))
    told = builder.get_metadata()
    assert told.description.startswith("# ")
    assert "content.data-type.dialogue" in told.tags
    assert set(told.tags) <= set(dataset_metadata.valid_tags())
