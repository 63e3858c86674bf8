"""A split of prepared sets as packed rows to score, in a folder that is gone afterwards.

Tokenizing, cutting and packing are those of training; only the batch plan and the row files of a
run are not needed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import ChatConfig, DataConfig
from zephyr_jax.data.packing import documents as tokenized
from zephyr_jax.data.packing import mixture, packing
from zephyr_jax.data.packing import plan as packing_plan
from zephyr_jax.data.packing.mixture import Member
from zephyr_jax.data.packing.packed import RECORDS_PER_PORTION
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.prepare.parallel import available_cores, run_tasks
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.storage import is_remote
from zephyr_jax.types import Rows


class SetPart(NamedTuple):
    """The records of one prepared set that are scored."""

    member: Member
    split: str
    records: Sequence[Row]
    taken: int  # the first so many


class Chosen(NamedTuple):
    """What is scored: dialogues or pairs of one or several sets."""

    parts: list[SetPart]
    pairs: bool

    @property
    def unit(self) -> str:
        """What a document is called."""
        return "pair" if self.pairs else "dialogue"


class Limits(NamedTuple):
    """How long rows and documents may be, in tokens."""

    seq_len: int  # of a row
    max_length: int  # of a dialogue; of a prompt with its longer answer
    max_prompt_length: int  # what the prompt of a longer pair is cut to


@dataclasses.dataclass(frozen=True)
class ScoreSet:
    """Packed documents; those of row i are `plan[i]`, numbers into `sources` and `prompts`."""

    documents: tokenized.Tokenized
    numbers: np.ndarray  # of each document here its number in `documents`, N
    plan: list[list[int]]
    sources: np.ndarray  # where each came from, N strings
    prompts: np.ndarray  # N; equal where the prompts are
    pairs: bool
    seq_len: int
    counts: dict[str, int]  # of what was read, cut and dropped

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, n_rows: int) -> Iterator[tuple[Rows, list[list[int]]]]:
        """Batches of `n_rows` rows in NumPy and the documents of each; empty rows end the last."""
        for start in range(0, len(self.plan), n_rows):
            plan = self.plan[start : start + n_rows]
            stacked = np.zeros(n_rows, packing.row_dtype(self.seq_len, 0))
            for at, documents in enumerate(plan):
                made = [self._document(int(self.numbers[i])) for i in documents]
                stacked[at] = packing.build_row(made, self.seq_len, 0)
            names = ("tokens", "segments", "positions", "branches")
            arrays: list[Any] = [stacked[name].astype(np.int32) for name in names]
            arrays.append(np.ascontiguousarray(stacked["loss_mask"]))
            yield Rows(*arrays), plan

    def _document(self, number: int) -> packing.Document:
        if self.pairs:
            return self.documents.pair(number, share_prompt=True)
        return self.documents.dialogue(number)


def choose(data_dir: str, dataset: str, split: str = "", limit: int = 0) -> Chosen:
    """The records that are scored.

    Args:
        data_dir: where prepare_data put the sets.
        dataset: one set or several, as in `DataConfig`; weights, which are about training, do not
            count.
        split: "": of each set the held-out one.
        limit: of each set only the first so many records; 0: all.

    Raises:
        FileNotFoundError: if a set has not been prepared.
        ValueError: if a set has no such split, or nothing in it, or dialogues and pairs are mixed.
    """
    config = DataConfig(data_dir, dataset, split, split, "", 1, "best_fit", 0)
    parts = []
    for member in mixture.members(config):
        if is_remote(member.folder):
            raise ValueError(
                f"{member.folder} is not on this machine; copy the set to a local disk"
            )
        name = split or _held_out(member)
        records = prepare.read_split(member.folder, name)
        if not len(records):
            raise ValueError(f"split {name} of {member.name} is empty; choose another by --split")
        taken = min(limit or len(records), len(records))
        parts.append(SetPart(member, name, records, taken))
    kinds = ["chosen" in part.records[0] for part in parts]
    if any(kinds) and not all(kinds):
        raise ValueError(f"{dataset} mixes dialogues and pairs; evaluate them one after another")
    return Chosen(parts, all(kinds))


def _held_out(member: Member) -> str:
    """The name of a set's held-out split."""
    dataset, _, config_name = member.name.partition("/")
    kind = prepare.DATASETS.get(dataset)
    if kind is None:
        raise ValueError(f"{member.name} is none of our sets; say its split with --split=NAME")
    schemas = kind.schemas()
    return schemas[config_name if config_name in schemas else kind.default].splits[1]


@contextlib.contextmanager
def packed_set(
    chosen: Chosen, tok: Tokenizer, chat: ChatConfig, limits: Limits
) -> Iterator[ScoreSet]:
    """The chosen records, tokenized and packed, for as long as the context is open.

    Raises:
        ValueError: if no record gives a document that fits.
    """
    with tempfile.TemporaryDirectory(prefix="zephyr_jax_evaluate_") as folder:
        rendering = _rendering(chosen, chat, limits)
        made = _tokenize(chosen, tok, rendering, Path(folder))
        usable_of = packing_plan.usable_pairs if chosen.pairs else packing_plan.usable_dialogues
        usable = usable_of(rendering, made.table, np.ones(len(made.table), np.int64))
        if not len(usable.indices):
            raise ValueError(f"no {chosen.unit} of {_named(chosen)} can be scored: {usable.counts}")
        yield ScoreSet(
            documents=made,
            numbers=usable.indices,
            plan=packing.best_fit(usable.lengths.tolist(), limits.seq_len),
            sources=_sources(chosen, made)[usable.indices],
            prompts=_prompts(chosen)[usable.indices],
            pairs=chosen.pairs,
            seq_len=limits.seq_len,
            counts=usable.counts,
        )


def _rendering(chosen: Chosen, chat: ChatConfig, limits: Limits) -> tokenized.Rendering:
    if not chosen.pairs:
        return tokenized.Rendering(chat, None, limits.max_length, "best_fit")
    dpo = DpoConfig(
        beta=1.0,  # rendering reads the two lengths only
        reference="none",
        max_length=limits.max_length,
        max_prompt_length=limits.max_prompt_length,
    )
    return tokenized.Rendering(chat, dpo, limits.seq_len, "best_fit")


def _tokenize(
    chosen: Chosen, tok: Tokenizer, rendering: tokenized.Rendering, folder: Path
) -> tokenized.Tokenized:
    stored = tokenized.store_tokenizer(tok, folder / "tokenizer.pickle")
    tasks = []
    for part in chosen.parts:
        for start in range(0, part.taken, RECORDS_PER_PORTION):
            records = np.arange(start, min(start + RECORDS_PER_PORTION, part.taken))
            out, source = str(folder / f"{len(tasks):05d}"), str(part.member.folder)
            tasks.append(tokenized.Portion(out, source, part.split, records, rendering, stored))
    sizes = [len(task.records) for task in tasks]
    workers = min(available_cores(), 1 + sum(sizes) // RECORDS_PER_PORTION)
    folders = run_tasks(
        *(tokenized.tokenize, tasks, workers), sizes=sizes, title="tokenize", unit=chosen.unit
    )
    return tokenized.Tokenized(folders, tokenized.code_dtype(tok.vocab_size))


def _sources(chosen: Chosen, made: tokenized.Tokenized) -> np.ndarray:
    """Where each record came from: as it says itself, else its set where there are several."""
    several = len(chosen.parts) > 1
    homes = [
        part.member.name if several else "" for part in chosen.parts for _ in range(part.taken)
    ]
    return np.asarray([own or home for own, home in zip(made.sources, homes, strict=True)])


def _prompts(chosen: Chosen) -> np.ndarray:
    """A number for each record: the same where the prompts are. Of dialogues each has its own."""
    if not chosen.pairs:
        return np.arange(sum(part.taken for part in chosen.parts))
    seen: dict[str, int] = {}
    out = []
    for part in chosen.parts:
        for i in range(part.taken):
            turns = [[turn["role"], turn["content"]] for turn in part.records[i]["chosen"][:-1]]
            out.append(seen.setdefault(json.dumps(turns), len(seen)))
    return np.asarray(out)


def _named(chosen: Chosen) -> str:
    return ", ".join(f"{part.member.name} {part.split}" for part in chosen.parts)
