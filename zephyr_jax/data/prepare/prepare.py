"""What a prepared set is made of and how: raw rows -> TFDS records that Grain reads, and back.

TFDS is imported only where it works, since that takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from zephyr_jax import storage
from zephyr_jax.config import choose, require
from zephyr_jax.data.raw import dialogues, filters, pairs
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.readers import MAX_ROW_MB
from zephyr_jax.data.raw.schema import Row, Schema
from zephyr_jax.data.raw.sources import Sources, find_sources

VERSION = "1.1.0"  # of the content. Raise it when the same input gives other records.
HOLDOUT = 0.1
DUPLICATES = ("keep", "exact", "near")
REPORT = "report.json"
_REMEDY = "prepare the set again, with --overwrite"


class Dataset(NamedTuple):
    """One data set; README and citation are in `sets/NAME`."""

    schemas: Callable[..., dict[str, Schema]]  # by configuration, for some rules
    records: str  # "dialogue", "pair" or "unpaired"
    default: str  # the configuration without a name; any name stands for "own"


DATASETS = {
    "ultrachat": Dataset(dialogues.ultrachat_schemas, "dialogue", "raw"),
    "ultrafeedback": Dataset(pairs.ultrafeedback_schemas, "pair", "raw"),
    "messages": Dataset(dialogues.own_schemas, "dialogue", "own"),
    "preferences": Dataset(pairs.own_schemas, "pair", "own"),
    "unpaired": Dataset(dialogues.unpaired_schemas, "unpaired", "own"),
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which records of a set are used, and for which split; by prompt, in any order of the rows."""

    seed: int = 0
    # Fraction of the prompts held out where no file's name decides; None: HOLDOUT.
    holdout: float | None = None
    sample: float = 1.0  # fraction of the prompts used
    rows: tuple[int, int] | None = None  # sizes of both splits, instead of `sample` and `holdout`
    # "exact" drops rows with the prompt of an earlier row, "near" also those whose prompt is
    # similar to one (`filters.near_duplicates`).
    duplicates: str = "keep"
    drop_overlap: bool = False  # of training with the published held-out split; else an error
    max_chars: int = 0  # of all messages, of a pair's longer dialogue; 0 is no limit
    min_answer_chars: int = 0  # of every answer of the assistant
    max_turns: int = 0  # messages other than the system's; 0 is no limit
    decontaminate: tuple[str, ...] = ()  # files with prompts of benchmarks: `load_contaminants`
    # Consecutive words shared with such a prompt that contaminate a record.
    ngram: int = filters.NGRAM

    def __post_init__(self):
        rows, drawn = self.rows, self.holdout is not None or self.sample < 1.0
        rule = "a fraction from 0 to below 1"
        require(0.0 <= self.fraction_held_out < 1.0, "holdout", self.holdout, rule)
        require(0.0 < self.sample <= 1.0, "sample", self.sample, "above 0 and at most 1")
        holds = rows is None or (rows[0] > 0 and rows[1] >= 0 and not drawn)
        rule = "TRAINING,HELD_OUT, such as 207865,23110, without holdout and sample"
        require(holds, "rows", rows, rule)
        for name in ("max_chars", "min_answer_chars", "max_turns"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        rule = f"at least {filters.MIN_WORDS}"
        require(self.ngram >= filters.MIN_WORDS, "ngram", self.ngram, rule)
        choose("duplicates", self.duplicates, DUPLICATES)

    @property
    def fraction_held_out(self) -> float:
        """The fraction of the prompts that is held out where no file's name decides."""
        return HOLDOUT if self.holdout is None else self.holdout


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read, by which rules."""

    dataset: str
    config_name: str
    schema: Schema
    sources: Sources
    selection: Selection = dataclasses.field(default_factory=Selection)
    max_bad_fraction: float = 0.01  # of the rows; more that do not fit are an error
    max_row_mb: int = MAX_ROW_MB  # a longer line of a text is a row that does not fit

    def __post_init__(self):
        holds = 0.0 <= self.max_bad_fraction <= 1.0
        require(holds, "max_bad_fraction", self.max_bad_fraction, "a fraction from 0 to 1")
        holds = 0 < self.max_row_mb <= 1 << 20
        require(holds, "max_row_mb", self.max_row_mb, f"from 1 to {1 << 20}")
        named = [file.name for file in self.sources.files if file.split == self.schema.splits[1]]
        if named and self.selection.holdout is not None:
            raise ValueError(
                f"holdout={self.selection.holdout}, but {named[0]} is held out by its name: leave "
                "--holdout out, or rename the file"
            )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the content, as JSON: equal identities give equal sets."""
        contaminants = filters.load_contaminants(self.selection.decontaminate)
        selection = dataclasses.asdict(self.selection) | {
            "holdout": self.selection.fraction_held_out,
            "near_threshold": filters.SIMILARITY,
            "decontaminate": {file.name: file.sha256 for file in contaminants},
        }
        identity: dict[str, Any] = {"dataset": self.dataset, "config_name": self.config_name}
        identity |= {"version": VERSION, "selection": selection, "rules": dict(self.schema.rules)}
        identity["sources"] = {source.name: source.sha256 for source in self.sources.files}
        if splits := {file.name: file.split for file in self.sources.files if file.split}:
            identity["splits"] = splits
        if self.selection.duplicates == "near":
            identity["near_duplicates"] = filters.METHOD
        if self.max_row_mb != MAX_ROW_MB:
            identity["max_row_mb"] = self.max_row_mb
        return json.loads(json.dumps(identity))


def make_plan(
    dataset: str,
    source: str | os.PathLike[str],
    config_name: str | None = None,
    rules: CleaningRules | BinarizationRules | None = None,
    **options: Any,
) -> Plan:
    """The plan for a data set and its raw files; options are the further fields of `Plan`."""
    if dataset not in DATASETS:
        raise ValueError(f"no data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    kind = DATASETS[dataset]
    schemas, config_name = kind.schemas(rules), config_name or kind.default
    if not re.fullmatch(r"\w[\w.-]*", config_name):
        raise ValueError(f"config_name={config_name!r}: use letters, digits and . _ - only")
    schema = schemas.get("own", schemas.get(config_name))
    if schema is None:
        raise ValueError(
            f"{dataset} has no configuration {config_name!r}: choose one of {', '.join(schemas)}"
        )
    return Plan(dataset, config_name, schema, find_sources(source, schema), **options)


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    config_name: str | None = None,
    *,
    rules: CleaningRules | BinarizationRules | None = None,
    workers: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """The folder `data_dir/dataset/config_name/version` of a set, written unless it exists.

    It appears complete or not at all. A set that was made from the same files by the same rules is
    verified and returned; any other, or a damaged one, is replaced only with `overwrite`. `source`
    is a folder of jsonl, JSON (also .gz, .zst) or parquet, a file, a glob or a hub id;
    `config_name` is `raw` (the default), `200k` or `binarized`, of one's own data any (`own`);
    `workers` are processes, 0 is one for each core, if there is enough to do; `options` are the
    further fields of `Plan`. A ValueError or FileNotFoundError says what does not fit.
    """
    if storage.is_remote(data_dir):
        raise ValueError(f"data_dir={data_dir} is not local: prepare on a disk, then copy it there")
    plan = make_plan(dataset, source, config_name, rules, **options)
    final = Path(data_dir).expanduser().absolute() / plan.dataset / plan.config_name / VERSION
    if _exists(plan, final, overwrite):
        return final
    from zephyr_jax.data.prepare.records import write_set

    with storage.atomic_path(final, replace=overwrite) as temporary:
        write_set(plan, temporary, workers)
        storage.seal(temporary)
    return final


def _exists(plan: Plan, final: Path, overwrite: bool) -> bool:
    """Whether the planned set is there; another one in its place is an error or overwritten."""
    if not final.exists():
        return False
    now, made_from = plan.identity(), {}
    try:
        made_from = report(final)["made_from"]
        storage.verify(final, required=False, remedy=_REMEDY)
    except FileNotFoundError:
        pass  # something else is in the way
    except ValueError:
        if not overwrite:
            raise
        return False
    differing = [k for k in now | made_from if made_from.get(k) != now.get(k)]
    if differing and not overwrite:
        raise ValueError(
            f"{final} holds another set ({', '.join(differing)} differ): give another data_dir, "
            "or --overwrite to replace it"
        )
    if not differing:
        logging.info("%s exists, made from the same files by the same rules.", final)
    return not differing


def set_folder(data_dir: str, name: str) -> epath.Path:
    """The folder of the newest version of a prepared set; a FileNotFoundError without any."""
    base = epath.Path(data_dir) / name
    folders = sorted(base.iterdir()) if base.is_dir() else []
    versions = [folder for folder in folders if (folder / "dataset_info.json").is_file()]
    if not versions:
        dataset, _, variant = name.partition("/")
        raise FileNotFoundError(
            f"no prepared set in {base}; make it with: python scripts/prepare_data.py {dataset} "
            f"--source=FOLDER --data_dir={data_dir} --config_name={variant or 'raw'}"
        )
    return versions[-1]


class Split(Sequence[Row]):
    """One split of a prepared set: plain dicts of str, float and lists, read on access."""

    def __init__(self, path: str | os.PathLike[str], records: Any):
        self._path, self._records = path, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        if isinstance(at, range):
            return [self[i] for i in at]
        try:
            record = self._records[at]
        except RuntimeError as error:  # by the file's own checksums; it was whole at the start
            raise OSError(f"{self._path}: {error}; {_REMEDY}") from error
        return {key: _plain(value) for key, value in record.items()}


def _plain(value: Any) -> Any:
    """A value as TFDS reads it, as JSON would hold it: a dict of columns becomes a list of rows."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        columns = {key: [_plain(item) for item in column] for key, column in value.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for row in rows:  # of dialogues; a turn that is marked in no way has role and content alone
            row |= json.loads(row.pop("tool", "") or "{}")
            if row.get("train"):
                del row["train"]
        return rows
    return bool(value) if isinstance(value, bool | np.bool_) else float(value)


_verify = functools.cache(functools.partial(storage.verify, required=False, remedy=_REMEDY))


def read_split(path: str | os.PathLike[str], split: str, *, contents: bool = True) -> Split:
    """The rows of one split of a prepared set, in their order on disk.

    A process verifies every file of the set the first time that it reads from it; without
    `contents` only their sizes. A ValueError names a damaged one.

    Dialogues have `prompt`, `prompt_id` and `messages`, lists of {"role", "content"} and, of a turn
    that is only context, `"train": False`, of tools the keys that `raw.schema` names; pairs have
    `prompt`, `prompt_id`, `chosen`, `rejected`, `score_chosen`, `score_rejected` and `source`;
    unpaired answers `prompt`, `prompt_id`, `messages`, `label` (a bool) and `source`.
    """
    import tensorflow_datasets as tfds

    report(path)
    _verify(os.fspath(path), contents=contents)
    try:
        builder = tfds.builder_from_directory(os.fspath(path))
    except Exception as error:  # of several packages that read its JSON files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset_info.json or features.json in {path} is damaged ({reason:.200}): {_REMEDY}"
        ) from error
    if split not in builder.info.splits:
        present = list(builder.info.splits)
        raise ValueError(
            f"{path} has no split {split!r}: it has {', '.join(present)}; prepare it with rows "
            "held out (--holdout), or train without evaluation: "
            f"--config.data.splits=\"('{present[0]}', '')\""
        )
    records: Any = builder.as_data_source  # whose declared type is a decorator's
    return Split(path, records(split))


def dataset_digest(path: str | os.PathLike[str]) -> str:
    """A SHA-256, in hex, of the records of all splits in their order, and of nothing else."""
    records = report(path)["records_sha256"]
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of how a prepared set was made: its `report.json`."""
    fields = ("made_from", "rows", "records_sha256")
    try:
        content = storage.read_json(epath.Path(path) / REPORT, _REMEDY, fields)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not a prepared data set (no {REPORT}): make one with prepare_data, and "
            f"give the folder that it names, data_dir/dataset/configuration/{VERSION}"
        ) from error
    if "sealed" in content or (epath.Path(path) / storage.MANIFEST).is_file():
        storage.verify(path, [REPORT], remedy=_REMEDY)
    return content
