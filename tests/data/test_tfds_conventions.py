"""The sets are TFDS sets: others read them without our code, and find what belongs to a set."""

import json
import subprocess
import sys

from raw_rows import dialogue, rated, write

from zephyr_jax.data.prepare.prepare import DATASETS, prepare

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
