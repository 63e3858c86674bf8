"""A split of prepared sets as packed rows to score, rendered and cut as in training."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from zephyr_jax.config.run import ChatConfig, DataConfig
from zephyr_jax.data.packing import mixture, packing
from zephyr_jax.data.packing.mixture import Member
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.storage import is_remote
from zephyr_jax.types import Rows


class SetPart(NamedTuple):
    """The first `n_records` records of a split of one prepared set."""

    member: Member
    split: str
    records: Sequence[Row]
    n_records: int


class SelectedRecords(NamedTuple):
    """What is scored: dialogues or pairs of one or several sets."""

    parts: list[SetPart]
    pairs: bool

    def records(self) -> Iterator[tuple[str, Row]]:
        """Yields every record after the name of its set."""
        for part in self.parts:
            for i in range(part.n_records):
                yield part.member.name, part.records[i]


class Limits(NamedTuple):
    """How long rows and documents may be, in tokens."""

    seq_len: int  # of a row
    max_length: int  # of a dialogue; of a prompt with its longer answer
    max_prompt_length: int  # what the prompt of a longer pair is cut to


@dataclasses.dataclass(frozen=True)
class ScoreSet:
    """Packed documents; those of row i are `plan[i]`, indices into the other fields."""

    documents: list[packing.Document]  # N
    plan: list[list[int]]
    sources: np.ndarray  # where each is from, N strings
    prompts: np.ndarray  # N; equal where the prompts are
    pairs: bool
    seq_len: int
    counts: dict[str, int]  # of what was read, cut and dropped

    def __len__(self) -> int:
        return len(self.documents)

    def batches(self, n_rows: int) -> Iterator[tuple[Rows, list[list[int]]]]:
        """Batches of `n_rows` rows in NumPy and the documents of each; empty rows end the last."""
        for start in range(0, len(self.plan), n_rows):
            plan = self.plan[start : start + n_rows]
            stacked = np.zeros(n_rows, packing.row_dtype(self.seq_len, 0))
            for at, indices in enumerate(plan):
                documents = [self.documents[i] for i in indices]
                stacked[at] = packing.build_row(documents, self.seq_len, 0)
            names = ("tokens", "segments", "positions", "branches")
            arrays: list[Any] = [stacked[name].astype(np.int32) for name in names]
            arrays.append(np.ascontiguousarray(stacked["loss_mask"]))
            yield Rows(*arrays), plan


def select_records(data_dir: str, dataset: str, split: str = "", limit: int = 0) -> SelectedRecords:
    """Returns the records that are scored.

    Args:
        data_dir: where prepare_data put the sets.
        dataset: names of prepared sets with commas between.
        split: "" means each set's held-out split.
        limit: only the first so many records of each set; 0: all.

    Raises:
        FileNotFoundError: if a set has not been prepared.
        ValueError: if a set lacks the split or it is empty, or dialogues and pairs are mixed.
    """
    parts = []
    names = {name.strip(): 1.0 for name in dataset.split(",")}
    config = DataConfig(data_dir, names, (split, split), "", 1, "best_fit")
    for member in mixture.members(config):
        if is_remote(member.folder):
            raise ValueError(f"{member.folder} is not on this machine; copy the set to a disk here")
        name = split or _held_out(member)
        records = prepare.read_split(member.folder, name)
        if not len(records):
            raise ValueError(f"split {name} of {member.name} is empty; choose another by --split")
        parts.append(SetPart(member, name, records, min(limit or len(records), len(records))))
    kinds = ["chosen" in part.records[0] for part in parts]
    if any(kinds) and not all(kinds):
        raise ValueError(f"{dataset} mixes dialogues and pairs; evaluate them one after another")
    return SelectedRecords(parts, all(kinds))


def _held_out(member: Member) -> str:
    """The name of a set's held-out split."""
    dataset, _, config_name = member.name.partition("/")
    kind = prepare.DATASETS.get(dataset)
    if kind is None:
        raise ValueError(f"{member.name} is not one of our sets; name its split by --split=NAME")
    schemas = kind.schemas()
    return schemas[config_name if config_name in schemas else kind.default].splits[1]


def pack_records(
    selected: SelectedRecords, tok: Tokenizer, chat: ChatConfig, limits: Limits
) -> ScoreSet:
    """Renders, cuts and packs the records; equal pairs count once.

    Raises:
        ValueError: if no record gives a document with a target that fits.
    """
    render = _pair if selected.pairs else _dialogue
    several = len(selected.parts) > 1
    counts: collections.Counter[str] = collections.Counter()
    documents, sources, prompts = [], [], []
    prompt_numbers: dict[str, int] = {}
    seen: set[str] = set()
    total = sum(part.n_records for part in selected.parts)
    bar = tqdm(selected.records(), total=total, desc="tokenize", unit="record", disable=None)
    for number, (name, record) in enumerate(bar):
        prompt = json.dumps(record["chosen"][:-1]) if selected.pairs else str(number)
        pair = json.dumps([record["chosen"], record["rejected"]]) if selected.pairs else prompt
        document, cut = render(tok, chat, limits, record)
        dropped = {
            "dropped_duplicate": pair in seen,
            "dropped_no_target": not document.loss_mask.any(),
            "dropped_too_long": len(document.tokens) > limits.seq_len,
        }
        seen.add(pair)
        counts.update({"read": 1} | cut | dropped)
        if not any(dropped.values()):
            documents.append(document)
            sources.append(record.get("source") or (name if several else ""))
            prompts.append(prompt_numbers.setdefault(prompt, len(prompt_numbers)))
    if not documents:
        names = ", ".join(f"{part.member.name} {part.split}" for part in selected.parts)
        raise ValueError(f"no record of {names} can be scored: {counts}")
    plan = packing.best_fit([len(document.tokens) for document in documents], limits.seq_len)
    where = np.asarray(sources), np.asarray(prompts)
    return ScoreSet(documents, plan, *where, selected.pairs, limits.seq_len, dict(counts))


def _options(chat: ChatConfig) -> dict[str, bool]:
    names = ("bos", "parse_special", "append_eos", "empty_system")
    return {name: getattr(chat, name) for name in names}


def _dialogue(
    tok: Tokenizer, chat: ChatConfig, limits: Limits, record: Row
) -> tuple[packing.Document, dict[str, int]]:
    ids, mask = render_chat(tok, record["messages"], **_options(chat))
    targets = mask if chat.loss_on == "assistant" else [1] * len(ids)
    over = max(len(ids) - limits.max_length, 0)
    document = packing.dialogue_document(ids, targets, limits.max_length)
    return document, {"truncated": int(over > 0), "tokens_cut": over}


def _pair(
    tok: Tokenizer, chat: ChatConfig, limits: Limits, record: Row
) -> tuple[packing.Document, dict[str, int]]:
    answers = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
    options = _options(chat) | {"score_header": chat.score_header}
    whole = render_pair(tok, record["chosen"][:-1], *answers, **options)
    bos = whole.prompt[:1] == [tok.bos_id]
    cut = packing.cut_pair(*whole, limits.max_length, limits.max_prompt_length, bos)
    prompt, *shortened = (len(a) < len(b) for a, b in zip(cut, whole, strict=True))
    counts = {"prompts_cut": int(prompt), "answers_cut": int(any(shortened))}
    return packing.pair_document(*cut, pair_id=1), counts
