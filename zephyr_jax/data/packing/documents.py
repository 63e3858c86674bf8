"""Documents as token ids on disk: made in portions by several processes, read one at a time.

A portion is a folder that appears whole, so that a run which was killed goes on from those it has.
It holds a table of its documents, and for every token one number: twice its id, plus one where it
is a target. Positions and branches follow from the lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zephyr_jax.config.run import ChatConfig, DpoConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer

# `parts`: tokens kept of a dialogue (then 0, 0), or of prompt, chosen, rejected; `whole`: tokens of
# the dialogue before it was cut; `cut`: 1 the prompt was cut, 2 an answer was.
DOCUMENT = np.dtype([("parts", "<i4", (3,)), ("whole", "<i4"), ("id", "<i8"), ("cut", "u1")])
_CODES, _TABLE, _SOURCES = "codes.bin", "documents.npy", "sources.npy"


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What shapes the ids of a document, beside the tokenizer."""

    chat: ChatConfig
    dpo: DpoConfig | None
    seq_len: int
    packing: str


class Portion(NamedTuple):
    """Records of one split that are tokenized together, and the folder for what they give."""

    out: str
    source: str  # folder of the prepared set
    split: str
    records: np.ndarray
    rendering: Rendering
    tokenizer: str  # a file made by `store_tokenizer`


def code_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds an id and the bit of a target."""
    return np.dtype("<u2" if 2 * vocab_size <= 1 << 16 else "<u4")


def store_tokenizer(tok: Tokenizer, path: Path) -> str:
    """Writes a tokenizer for `tokenize`; the path. A process loads it once."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(tok))
    os.replace(part, path)
    return str(path)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return pickle.loads(Path(path).read_bytes())


@functools.lru_cache(maxsize=4)
def _split(source: str, split: str) -> Sequence[Row]:
    return prepare.read_split(source, split)


def tokenize(portion: Portion) -> str:
    """Tokenizes the records of a portion unless that is done; its folder."""
    out = Path(portion.out)
    if out.is_dir():
        return portion.out
    tok, rendering = _tokenizer(portion.tokenizer), portion.rendering
    render = _pair if rendering.dpo else _dialogue
    split, dtype = _split(portion.source, portion.split), code_dtype(tok.vocab_size)
    table = np.zeros(len(portion.records), DOCUMENT)
    sources: list[str] = []
    # Of its own: a worker may outlive a run that was killed, and meet the next run's here.
    part = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    with (part / _CODES).open("wb") as file:
        for row, index in zip(table, portion.records, strict=True):
            record = split[int(index)]
            codes = render(tok, rendering, record, row)
            file.write(codes.astype(dtype).tobytes())
            sources.append(record.get("source", "") if rendering.dpo else "")
    np.save(part / _TABLE, table)
    np.save(part / _SOURCES, np.asarray(sources))
    try:
        part.rename(out)
    except OSError:
        if not out.is_dir():
            raise
        shutil.rmtree(part)  # another worker was faster
    return portion.out


def _options(chat: ChatConfig) -> dict[str, bool]:
    names = ("bos", "parse_special", "append_eos", "empty_system")
    return {name: getattr(chat, name) for name in names}


def _dialogue(tok: Tokenizer, rendering: Rendering, record: Row, row: np.void) -> np.ndarray:
    chat = rendering.chat
    ids, mask = render_chat(tok, record["messages"], **_options(chat))
    targets = mask if chat.loss_on == "assistant" else [1] * len(ids)
    row["whole"] = len(ids)
    if rendering.packing == "concat":
        row["parts"][0] = len(ids)
        return 2 * np.asarray(ids, np.int64) + np.asarray(targets)
    document = packing.dialogue_document(ids, targets, rendering.seq_len)
    row["parts"][0] = len(document.tokens)
    return 2 * document.tokens.astype(np.int64) + document.loss_mask


def pair_id(prompt: list[dict], chosen: str, rejected: str) -> int:
    """A positive 63-bit hash of a pair's prompt messages and both answers."""
    said = json.dumps([[(m["role"], m["content"]) for m in prompt], chosen, rejected])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1 or 1


def _pair(tok: Tokenizer, rendering: Rendering, record: Row, row: np.void) -> np.ndarray:
    dpo = rendering.dpo
    assert dpo is not None
    messages = record["chosen"][:-1]
    answers = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
    options = _options(rendering.chat) | {"score_header": rendering.chat.score_header}
    whole = render_pair(tok, messages, *answers, **options)
    with_bos = whole.prompt[:1] == [tok.bos_id]
    cut = packing.cut_pair(*whole, dpo.max_length, dpo.max_prompt_length, with_bos)
    shortened = [len(a) < len(b) for a, b in zip(cut, whole, strict=True)]
    row["parts"] = [len(part) for part in cut]
    row["id"] = pair_id(messages, *answers)
    row["cut"] = shortened[0] + 2 * (shortened[1] or shortened[2])
    return 2 * np.asarray([token for part in cut for token in part], np.int64)


class Tokenized:
    """The documents of some portions, one after another, read from disk when they are asked for.

    `table` has a row of DOCUMENT for every record that was tokenized, dropped ones included;
    `sources` says of each pair where it came from, "" where its record does not.
    """

    def __init__(self, folders: Sequence[str], dtype: np.dtype):
        self._folders, self._dtype = folders, dtype
        tables = [np.load(Path(folder) / _TABLE) for folder in folders]
        self.table = np.concatenate([np.zeros(0, DOCUMENT), *tables])
        named = [np.load(Path(folder) / _SOURCES) for folder in folders]
        self.sources = np.concatenate([np.zeros(0, "U1"), *named])
        sizes = self.table["parts"].sum(axis=1, dtype=np.int64)
        self._firsts = np.cumsum([0, *(len(table) for table in tables)])
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def codes(self, index: int) -> np.ndarray:
        """The numbers of document `index`, `T` int64."""
        at = int(np.searchsorted(self._firsts, index, side="right")) - 1
        begin = self._starts[index] - self._starts[self._firsts[at]]
        count = self._starts[index + 1] - self._starts[index]
        path, offset = os.path.join(self._folders[at], _CODES), begin * self._dtype.itemsize
        found = np.fromfile(path, self._dtype, int(count), offset=int(offset))
        if len(found) != count:
            raise ValueError(f"{path} is too short; delete {Path(path).parents[2]} and pack again")
        return found.astype(np.int64)

    def dialogue(self, index: int) -> packing.Document:
        """Document `index` of a set of dialogues."""
        codes = self.codes(index)
        n = len(codes)
        tokens, targets = (codes >> 1).astype(np.int32), (codes & 1).astype(bool)
        return packing.Document(
            tokens, np.arange(n, dtype=np.int32), np.zeros(n, np.uint8), targets
        )

    def pair(self, index: int, share_prompt: bool) -> packing.Document:
        """Document `index` of a set of pairs."""
        row = self.table[index]
        prompt, chosen, _ = np.cumsum(row["parts"])
        tokens = self.codes(index) >> 1
        return packing.pair_document(
            tokens[:prompt].tolist(),
            tokens[prompt:chosen].tolist(),
            tokens[chosen:].tolist(),
            int(row["id"]),
            share_prompt,
        )

    def stream(self, indices: Iterable[int], skip: int, length: int) -> np.ndarray:
        """`length` numbers of these documents laid end to end, from number `skip` on."""
        return np.concatenate([self.codes(i) for i in indices])[skip : skip + length]
