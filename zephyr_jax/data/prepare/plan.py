"""The data sets that can be prepared, and everything that decides what a prepared set holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from zephyr_jax.data.raw import dialogues, pairs
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.filters import METHOD, NGRAM, SIMILARITY, Contaminants, load_contaminants
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.data.raw.sources import Sources

VERSION = "1.1.0"  # of the content. Raise it when the same input gives other records.
HOLDOUT = 0.1
DUPLICATES = ("keep", "exact", "near")


class Dataset(NamedTuple):
    """One data set; README, tags and citation are in `sets/NAME`."""

    schemas: Callable[..., dict[str, Schema]]  # by configuration, for some rules
    rules: type[CleaningRules] | type[BinarizationRules]
    records: str  # "dialogue", "pair" or "unpaired"
    named_by_user: bool = False  # any name stands for the default configuration, the first

    @property
    def default(self) -> str:
        """The name of the default configuration."""
        return next(iter(self.schemas()))


DATASETS = {
    "ultrachat": Dataset(dialogues.ultrachat_schemas, CleaningRules, "dialogue"),
    "ultrafeedback": Dataset(pairs.ultrafeedback_schemas, BinarizationRules, "pair"),
    "messages": Dataset(dialogues.own_schemas, CleaningRules, "dialogue", named_by_user=True),
    "preferences": Dataset(pairs.own_schemas, BinarizationRules, "pair", named_by_user=True),
    "unpaired": Dataset(
        dialogues.unpaired_schemas, BinarizationRules, "unpaired", named_by_user=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which records of a set are used, and for which split; by prompt, in any order of the rows."""

    seed: int = 0
    # Fraction of the prompts held out where no file's name decides; None: HOLDOUT.
    holdout: float | None = None
    sample: float = 1.0  # fraction of the prompts used
    rows: tuple[int, int] | None = None  # sizes of both splits, instead of `sample` and `holdout`
    # "exact" drops rows with the prompt of an earlier row, "near" also those whose prompt has an
    # estimated Jaccard similarity of at least `near_threshold` to one.
    duplicates: str = "keep"
    near_threshold: float = SIMILARITY
    drop_overlap: bool = False  # of training with the published held-out split; else an error
    max_chars: int = 0  # of all messages, of a pair's longer dialogue; 0 is no limit
    min_answer_chars: int = 0  # of every answer of the assistant
    max_turns: int = 0  # messages other than the system's; 0 is no limit
    decontaminate: tuple[str, ...] = ()  # files with prompts of benchmarks: `load_contaminants`
    ngram: int = NGRAM  # consecutive words shared with such a prompt that contaminate a record

    def __post_init__(self):
        if not 0.0 <= self.fraction_held_out < 1.0:
            raise ValueError(f"holdout={self.holdout} is not a fraction between 0 and 1")
        if self.rows is not None and self.holdout is not None:
            raise ValueError(f"holdout={self.holdout} and rows={self.rows}: give one of them")
        for name in ("sample", "near_threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        minima = {"max_chars": 0, "min_answer_chars": 0, "max_turns": 0, "ngram": 1}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.rows is not None and self.sample < 1.0:
            raise ValueError(f"sample={self.sample} and rows={self.rows}: give one of them")
        if self.rows is not None and (self.rows[0] <= 0 or self.rows[1] < 0):
            raise ValueError(f"rows={self.rows}: give TRAINING,HELD_OUT, such as 207865,23110")
        if self.duplicates not in DUPLICATES:
            raise ValueError(
                f"duplicates={self.duplicates!r} is unknown: choose one of {', '.join(DUPLICATES)}"
            )

    @property
    def fraction_held_out(self) -> float:
        """The fraction of the prompts that is held out where no file's name decides."""
        return HOLDOUT if self.holdout is None else self.holdout


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read, by which rules. More unfit rows than `max_bad_fraction` are an error."""

    dataset: str
    config_name: str
    schema: Schema
    sources: Sources
    selection: Selection = dataclasses.field(default_factory=Selection)
    max_bad_fraction: float = 0.01

    def __post_init__(self):
        named = [file.name for file in self.sources.files if file.split == self.schema.splits[1]]
        if named and self.selection.holdout is not None:
            raise ValueError(
                f"holdout={self.selection.holdout}, but {named[0]} is held out by its name: leave "
                "--holdout out, or rename the file"
            )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the content, as JSON: equal identities give equal sets."""
        selection = dataclasses.asdict(self.selection)
        selection["holdout"] = self.selection.fraction_held_out
        selection["decontaminate"] = {file.name: file.sha256 for file in self.contaminants()}
        identity: dict[str, Any] = {
            "dataset": self.dataset,
            "config_name": self.config_name,
            "version": VERSION,
            "selection": selection,
            "rules": dict(self.schema.rules),
            "sources": {source.name: source.sha256 for source in self.sources.files},
        }
        if named := {file.name: file.split for file in self.sources.files if file.split}:
            identity["splits"] = named
        if self.selection.duplicates == "near":
            identity["near_duplicates"] = METHOD
        return json.loads(json.dumps(identity))

    def contaminants(self) -> Contaminants:
        """The benchmark prompts that the selection names, read from their files."""
        return load_contaminants(self.selection.decontaminate)
