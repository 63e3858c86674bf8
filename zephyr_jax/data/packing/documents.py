"""Documents as tokens on disk: made by several processes, read one at a time.

A folder holds ragged arrays: a file with the tokens of each chunk of documents, and a table that
says where each document begins.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.packing import Document
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.prepare.convert import available_cores, run_tasks
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer

# `uncut`: the tokens of a dialogue before it was cut. `id` is that of a pair.
_COLUMNS = ("chunk", "start", "length", "uncut", "id", "prompt_cut", "answer_cut")
DOCUMENT = np.dtype([(name, "?" if name.endswith("_cut") else "<i8") for name in _COLUMNS])
TOKEN = np.dtype([("tokens", "<i4"), ("positions", "<i4"), ("branches", "u1"), ("loss_mask", "?")])
CHAT_OPTIONS = ("bos", "parse_special", "append_eos", "empty_system")
RECORDS_PER_CHUNK = 2048  # a process more is worth its start for about as many


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What shapes the tokens of a document, together with the tokenizer."""

    chat: ChatConfig
    pairs: bool
    max_length: int | None  # of a dialogue (None: not cut), of a prompt with its longer answer
    max_prompt_length: int = 0


class Records(NamedTuple):
    """Records of one split of a prepared set."""

    source: str  # the set's folder
    split: str
    indices: np.ndarray  # N int64


class Documents:
    """The tokenized records in a folder, read from disk one at a time.

    `table` has a row of DOCUMENT for every record, dropped ones included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.table = folder, np.load(folder / "table.npy")

    @property
    def sources(self) -> np.ndarray:
        """Where each pair came from, N strings; "" where its record does not say."""
        return np.load(self.folder / "sources.npy")

    def __getitem__(self, index: int) -> Document:
        chunk, start, length, *_ = row = self.table[index]
        path, offset = self.folder / f"{chunk:05d}.bin", start * TOKEN.itemsize
        tokens = np.fromfile(path, TOKEN, length, offset=offset)
        return Document(*(tokens[name] for name in TOKEN.fields or ()), id=int(row["id"]))


def tokenize(
    folder: Path, tok: Tokenizer, rendering: Rendering, parts: Sequence[Records]
) -> Documents:
    """Tokenizes records into a new folder, in their order whatever the number of processes."""
    folder.mkdir(parents=True)
    chunks = [
        part._replace(indices=part.indices[start : start + RECORDS_PER_CHUNK])
        for part in parts
        for start in range(0, len(part.indices), RECORDS_PER_CHUNK)
    ]
    n_records = sum(len(part.indices) for part in parts)
    results = run_tasks(
        functools.partial(_tokenize_chunk, folder, pickle.dumps(tok), rendering),
        list(enumerate(chunks)),
        min(available_cores(), 1 + n_records // RECORDS_PER_CHUNK),
        "tokenize",
    )
    tables, sources = zip(*results, strict=True) if results else ((), ())
    np.save(folder / "table.npy", np.concatenate([np.zeros(0, DOCUMENT), *tables]))
    np.save(folder / "sources.npy", np.concatenate([np.zeros(0, "U1"), *sources]))
    return Documents(folder)


@functools.lru_cache(maxsize=1)
def _tokenizer(pickled: bytes) -> Tokenizer:
    return pickle.loads(pickled)


_read_split = functools.lru_cache(maxsize=4)(prepare.read_split)


def _tokenize_chunk(
    folder: Path, pickled: bytes, rendering: Rendering, chunk: tuple[int, Records]
) -> tuple[np.ndarray, np.ndarray]:
    """Writes a chunk's tokens; returns its rows of the table and where the records came from."""
    number, records = chunk
    tok, split = _tokenizer(pickled), _read_split(records.source, records.split)
    document_of = pair_of if rendering.pairs else dialogue_of
    table = np.zeros(len(records.indices), DOCUMENT)
    documents, sources = [], []
    for row, index in zip(table, records.indices, strict=True):
        record = split[int(index)]
        documents.append(document_of(tok, rendering, record, row))
        sources.append(record.get("source", "") if rendering.pairs else "")
    table["chunk"] = number
    table["start"] = np.cumsum(table["length"]) - table["length"]
    tokens = np.zeros(int(table["length"].sum()), TOKEN)
    for name in TOKEN.fields or ():
        tokens[name] = np.concatenate([getattr(document, name) for document in documents])
    tokens.tofile(folder / f"{number:05d}.bin")
    return table, np.asarray(sources)


def dialogue_of(tok: Tokenizer, rendering: Rendering, record: Row, row: np.void) -> Document:
    """The document of a dialogue; sets `length` and `uncut` in `row`, of DOCUMENT."""
    chat = rendering.chat
    options = {name: getattr(chat, name) for name in CHAT_OPTIONS}
    ids, mask = render_chat(tok, record["messages"], **options)
    targets = mask if chat.loss_on == "assistant" else [1] * len(ids)
    document = packing.dialogue_document(ids, targets, rendering.max_length)
    row["length"], row["uncut"] = len(document.tokens), len(ids)
    return document


def pair_of(tok: Tokenizer, rendering: Rendering, record: Row, row: np.void) -> Document:
    """The document of a pair; sets `length`, `id` and what was cut in `row`, of DOCUMENT."""
    messages = record["chosen"][:-1]
    answers = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
    options = {name: getattr(rendering.chat, name) for name in (*CHAT_OPTIONS, "score_header")}
    uncut = render_pair(tok, messages, *answers, **options)
    with_bos = uncut.prompt[:1] == [tok.bos_id]
    assert rendering.max_length is not None, "pairs are always cut"
    parts = packing.cut_pair(*uncut, rendering.max_length, rendering.max_prompt_length, with_bos)
    shorter = [len(a) < len(b) for a, b in zip(parts, uncut, strict=True)]
    document = packing.pair_document(*parts, pair_id(messages, *answers))
    row["length"], row["id"] = len(document.tokens), document.id
    row["prompt_cut"], row["answer_cut"] = shorter[0], any(shorter[1:])
    return document


def pair_id(prompt: list[dict], chosen: str, rejected: str) -> int:
    """A positive 63-bit hash of a pair's prompt messages and both answers."""
    content = json.dumps([[(m["role"], m["content"]) for m in prompt], chosen, rejected])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1 or 1
