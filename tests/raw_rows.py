"""Synthetic rows of the raw and the published schemas, files of them, and readers of sets."""

import gzip
import json

from zephyr_jax.data.prepare.prepare import read_split
from zephyr_jax.data.raw.schema import prompt_digest


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


def write_raw(folder):
    """80 raw dialogues in two files, one of them compressed."""
    write(folder / "train_0.jsonl", map(dialogue, range(50)))
    write(folder / "train_1.jsonl.gz", map(dialogue, range(50, 80)))
    return folder
