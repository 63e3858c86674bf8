"""Rows in the shapes of people's own files, through a schema and through parquet."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq


def messages(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]


def system(text="Be brief."):
    return {"role": "system", "content": text}


def through(schema, row):
    """The record of a row, or None, and the counts; the row stays as it was."""
    before = json.dumps(row)
    assert schema.fits(row)
    assert schema.unfit(row) is None
    records, counts = schema.convert(row)
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
