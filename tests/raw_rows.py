"""Rows of the raw, the published and people's own schemas, files of them, and readers of sets."""

import gzip
import io
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zephyr_jax.data.prepare.prepare import prepare, read_split, report
from zephyr_jax.data.raw.schema import BadRow, prompt_digest
from zephyr_jax.demo import corpus


def dialogue(number):
    return {"id": str(number), "data": [f"question {number}? please", f"Answer {number}."]}


def chat(number):
    prompt = f"Question {number}?"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes. é"}]
    return {"prompt": prompt, "prompt_id": prompt_digest(prompt), "messages": messages}


def rated(number):
    scores = [{"overall_score": 2.0 + index, "annotations": {}} for index in range(4)]
    answers = [{"response": f"Answer {index}", **score} for index, score in enumerate(scores)]
    return {"instruction": f"Question {number}?", "source": "flan", "completions": answers}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def everything(path):
    kept = report(path)["rows"]["kept"]
    return {split: list(read_split(path, split)) for split, rows in kept.items() if rows}


def write_raw(folder):
    """80 raw dialogues in two files, one of them compressed."""
    write(folder / "train_0.jsonl", map(dialogue, range(50)))
    write(folder / "train_1.jsonl.gz", map(dialogue, range(50, 80)))
    return folder


def write_world(root, pieces):
    """Raw records, a tokenizer of so many pieces, and both prepared sets."""
    names, raw = ("ultrachat", "ultrafeedback"), root / "raw"
    corpus.write_ultrachat(raw / names[0], 120, 0)
    corpus.write_ultrafeedback(raw / names[1], 60, 0)
    lines = corpus.tokenizer_lines(*(raw / name for name in names))
    corpus.train_tokenizer(lines, root / "tokenizer" / "tokenizer.model", pieces)
    for name in names:
        prepare(name, raw / name, root / "data", "raw")
    return root


def messages(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]


def system(text="Be brief."):
    return {"role": "system", "content": text}


def unfit(schema, row):
    """The reason why a row does not fit a schema, or None."""
    try:
        schema.read(row)
    except BadRow as error:
        return str(error)


def through(schema, row) -> tuple[Any, Counter[str]]:
    """The record of a row, or None, and the counts; the row stays as it was."""
    before = json.dumps(row)
    assert schema.fits(row)
    records, counts = schema.read(row)
    record = records[0] if records else None
    for rule in [*counts, "too_long"]:
        for shown in (row, record) if record else (row,):
            assert all(isinstance(text, str) for text in schema.texts(shown, rule))
    assert json.dumps(row) == before
    return record, counts


def of_parquet(*rows):
    columns = {key: None for row in rows for key in row}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**columns, **row} for row in rows]), buffer)
    return pq.read_table(buffer).to_pylist()
