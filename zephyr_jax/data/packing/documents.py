"""Records of prepared sets as tokens on disk: made by several processes, read one at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from zephyr_jax.config.run import ChatConfig, DataConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.packing import Document
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.prepare.convert import available_cores, run_tasks
from zephyr_jax.data.raw.schema import Row, window
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer

# Where a document is stored, and what plans need to know of it.
_FLAGS = ("prompt_cut", "answer_cut", "equal")
_FIELDS = ("uncut", "id", "prompt", "answer", *_FLAGS)  # of `Document`
_COLUMNS = ("chunk", "start", "length", *_FIELDS)
DOCUMENT = np.dtype([(name, "?" if name in _FLAGS else "<i8") for name in _COLUMNS])
TOKEN = np.dtype([("tokens", "<i4"), ("positions", "<i4"), ("branches", "u1"), ("loss_mask", "?")])
CHAT_OPTIONS = ("bos", "parse_special", "append_eos", "empty_system")
RECORDS_PER_CHUNK = 2048  # a process more is worth its start for about as many
Records = tuple[str, str, np.ndarray]  # of a set's folder and a split, by their indices


class Member(NamedTuple):
    """A prepared set of a run's data."""

    name: str
    weight: float  # how often its training records are taken
    folder: epath.Path
    digest: str  # of its records

    def times_taken(self, n_records: int, seed: int) -> np.ndarray:
        """How often each training record is taken, `N` int64; a fraction is a seeded draw."""
        times = np.full(n_records, int(self.weight), np.int64)
        name = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        drawn = np.random.default_rng([seed, name]).permutation(n_records)
        times[drawn[: round(self.weight % 1 * n_records)]] += 1
        return times


def members(config: DataConfig) -> list[Member]:
    """The sets of a run in their configured order; a FileNotFoundError if one is not prepared."""
    sets = []
    for name, weight in config.dataset_weights.items():
        folder = prepare.set_folder(config.data_dir, name)
        sets.append(Member(name, float(weight), folder, prepare.dataset_digest(folder)))
    return sets


def identity(sets: list[Member], seed: int) -> dict[str, object]:
    """What identifies the records and how often they are taken: `dataset`, a digest of all."""
    if len(sets) == 1 and sets[0].weight == 1:
        return {"dataset": sets[0].digest}
    mixed = [[member.name, member.weight, member.digest] for member in sets]
    out: dict[str, object] = {"mixture": mixed}
    if any(member.weight % 1 for member in sets):
        out["mixture_seed"] = seed
    return {"dataset": hashlib.sha256(json.dumps(out).encode()).hexdigest()} | out


class Rendering(NamedTuple):
    """What shapes the tokens of a document, together with the tokenizer."""

    chat: ChatConfig
    pairs: bool
    max_length: int | None  # of a dialogue (None: not cut), of a prompt with its longer answer
    max_prompt_length: int = 0
    labeled: bool = False  # a "pair" is an answer with a label, twice


class Documents(NamedTuple):
    """Tokenized records in a folder, read from disk one at a time."""

    folder: Path
    table: np.ndarray  # N of DOCUMENT, a row for every record, dropped ones included
    sources: np.ndarray  # N strings, where each pair came from; "" if its record does not say

    def read(self, index: int) -> Document:
        """One document."""
        row = self.table[index]
        path, offset = self.folder / f"{row['chunk']}.bin", row["start"] * TOKEN.itemsize
        tokens = np.fromfile(path, TOKEN, row["length"], offset=offset)
        return Document(*(tokens[name] for name in TOKEN.fields or ()), id=int(row["id"]))


def tokenize(
    folder: Path, tok: Tokenizer, rendering: Rendering, parts: Sequence[Records]
) -> Documents:
    """Tokenizes records into a new folder, in their order whatever the number of processes."""
    folder.mkdir(parents=True)
    chunks = [
        (source, split, indices[start : start + RECORDS_PER_CHUNK])
        for source, split, indices in parts
        for start in range(0, len(indices), RECORDS_PER_CHUNK)
    ]
    n_records = sum(len(indices) for _, _, indices in parts)
    workers = min(available_cores(), 1 + n_records // RECORDS_PER_CHUNK)
    write = functools.partial(_tokenize_chunk, folder, pickle.dumps(tok), rendering)
    results = run_tasks(write, list(enumerate(chunks)), workers, "tokenize")
    table = np.concatenate([np.zeros(0, DOCUMENT), *(table for table, _ in results)])
    sources = np.concatenate([np.zeros(0, "U1"), *(sources for _, sources in results)])
    return Documents(folder, table, sources)


# Of a set that the first process has verified.
_read_split = functools.lru_cache(4)(functools.partial(prepare.read_split, contents=False))
_unpickle_tokenizer = functools.lru_cache(maxsize=1)(pickle.loads)


def _tokenize_chunk(
    folder: Path, pickled: bytes, rendering: Rendering, chunk: tuple[int, Records]
) -> tuple[np.ndarray, np.ndarray]:
    """Writes a chunk's tokens; returns its rows of the table and where the records came from."""
    number, (source, split, indices) = chunk
    tok, records = _unpickle_tokenizer(pickled), _read_split(source, split)
    taken = {f"{source} {split}, record {index}": records[int(index)] for index in indices}
    documents = [document_of(tok, rendering, record, place) for place, record in taken.items()]
    table = document_table(documents, number)
    tokens = np.zeros(table["length"].sum(), TOKEN)
    for name in TOKEN.fields or ():
        tokens[name] = np.concatenate([getattr(document, name) for document in documents])
    tokens.tofile(folder / f"{number}.bin")
    return table, np.asarray([record.get("source", "") for record in taken.values()])


def document_of(tok: Tokenizer, rendering: Rendering, record: Row, place: str) -> Document:
    """The document of a record, a dialogue or a pair; a refusal names it and its `place`."""
    try:
        return _document_of(tok, rendering, record)
    except ValueError as error:
        name = f"prompt_id {record['prompt_id']}, {window(record['prompt'], width=40)!r}"
        raise ValueError(f"{place} ({name}): {error}") from error


def _document_of(tok: Tokenizer, rendering: Rendering, record: Row) -> Document:
    chat, kinds = rendering.chat, ("dialogues", "pairs", "labeled answers")
    wanted = kinds[rendering.pairs + rendering.labeled]
    found = kinds[2 if "label" in record else "chosen" in record]
    if found != wanted:
        raise ValueError(
            f"the set has {found} and the run takes {wanted}; dialogues are for SFT, pairs for "
            "config.dpo, labeled answers for dpo.loss=kto"
        )
    options = {name: getattr(chat, name) for name in CHAT_OPTIONS}
    if not rendering.pairs:
        options["loss_on_all"] = chat.loss_on == "all"
        ids, targets = render_chat(tok, record["messages"], **options)
        return packing.dialogue_document(ids, targets, rendering.max_length)
    sides = ("messages", "messages") if rendering.labeled else ("chosen", "rejected")
    messages = record[sides[0]][:-1]
    answers = [record[side][-1]["content"] for side in sides]
    uncut = render_pair(tok, messages, *answers, **options, score_header=chat.score_header)
    with_bos = uncut.prompt[:1] == [tok.bos_id]
    assert rendering.max_length is not None, "pairs are always cut"
    parts = packing.cut_pair(*uncut, rendering.max_length, rendering.max_prompt_length, with_bos)
    prompt, *both = (len(part) < len(whole) for part, whole in zip(parts, uncut, strict=True))
    document = packing.pair_document(*parts, pair_id(messages, *answers))
    document = document._replace(prompt_cut=prompt, answer_cut=any(both))
    if not rendering.labeled:
        return document._replace(equal=parts[1] == parts[2])
    sign, prompt_id = 1 if record["label"] else -1, pair_id(messages, "", "")
    return document._replace(id=sign * document.id, prompt=prompt_id, answer=len(parts[1]))


def with_other_answer(document: Document, other: Document, max_length: int) -> Document:
    """A labeled answer's document, its id too, with the second answer of `other`, cut to fit."""
    shared, own, _ = (document.tokens[document.branches == branch] for branch in range(3))
    answer = other.tokens[other.branches == 2][1:][: max_length - len(shared) - 1]
    number = pair_id([], str(abs(document.id)), str(other.id)) * (1 if document.id > 0 else -1)
    return packing.pair_document([*shared, own[0]], own[1:].tolist(), answer.tolist(), number)


def document_table(documents: Sequence[Document], chunk: int = 0) -> np.ndarray:
    """A row of DOCUMENT for each document of a chunk, `N`."""
    table = np.zeros(len(documents), DOCUMENT)
    table["chunk"], table["length"] = chunk, [len(document.tokens) for document in documents]
    for name in _FIELDS:
        table[name] = [getattr(document, name) for document in documents]
    table["start"] = np.cumsum(table["length"]) - table["length"]
    return table


def pair_id(prompt: list[dict], chosen: str, rejected: str) -> int:
    """A positive 63-bit hash of a pair's prompt messages and both answers."""
    content = json.dumps([[(m["role"], m["content"]) for m in prompt], chosen, rejected])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1 or 1
