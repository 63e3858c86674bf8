"""Raw rows -> TFDS records that Grain reads, and prepared records as dicts.

`prepare` makes a set, `read_split` reads one, `dataset_digest` identifies its content. TFDS is
imported only where it works, since that takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from zephyr_jax import storage
from zephyr_jax.data.prepare.plan import DATASETS, VERSION, Plan, Selection
from zephyr_jax.data.prepare.select import REPORT
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.raw.sources import find_sources
from zephyr_jax.storage import read_json


def make_plan(
    dataset: str,
    source: str | os.PathLike[str],
    config_name: str | None = None,
    rules: CleaningRules | BinarizationRules | None = None,
    **options: Any,
) -> Plan:
    """The plan for a data set and its raw files; arguments as those of `prepare`."""
    if dataset not in DATASETS:
        raise ValueError(f"no data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    kind = DATASETS[dataset]
    schemas = kind.schemas(rules)
    config_name = config_name or kind.default
    if kind.named_by_user:
        if not re.fullmatch(r"[\w.-]+", config_name):
            raise ValueError(f"config_name={config_name!r}: use letters, digits and . _ - only")
        schemas = {config_name: schemas[kind.default]}
    if config_name not in schemas:
        raise ValueError(
            f"{dataset} has no configuration {config_name!r}: choose one of {', '.join(schemas)}"
        )
    siblings = {f"--config_name={name}": schema for name, schema in schemas.items()}
    for other, its in reversed(DATASETS.items()):
        for name, schema in its.schemas().items():
            option = "" if its.named_by_user else f" --config_name={name}"
            siblings[f"prepare_data {other}{option}"] = schema
    sources = find_sources(source, schemas[config_name], siblings)
    return Plan(dataset, config_name, schemas[config_name], sources, **options)


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    config_name: str | None = None,
    *,
    rules: CleaningRules | BinarizationRules | None = None,
    selection: Selection | None = None,
    max_bad_fraction: float = 0.01,
    workers: int = 0,
    overwrite: bool = False,
    beam: Sequence[str] | None = None,
) -> Path:
    """The folder `data_dir/dataset/config_name/version` of a set, written unless it exists.

    The folder appears complete or not at all. A set that was made from the same files by the same
    rules is returned at once.

    Args:
      dataset: one of `plan.DATASETS`.
      source: a folder of jsonl, JSON (also .gz, .zst) or parquet, one file, a glob or a hub id.
      data_dir: a local folder; created if missing.
      config_name: `raw` (the default), `200k` or `binarized`; of one's own data any (`own`).
      rules: `CleaningRules` of dialogues, `BinarizationRules` of pairs.
      selection: which records are used, and for which split.
      max_bad_fraction: fraction of rows that may fail to fit the schema.
      workers: processes; 0: one for each core, if there is enough to do.
      overwrite: replace a set that was made from other files or by other rules.
      beam: options of Apache Beam, which then replaces the processes (see docs/data.md).

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: a name is unknown, too many rows do not fit, nothing is left, splits share a
        prompt, or another set is in the way.
    """
    if "://" in os.fspath(data_dir):
        raise ValueError(f"data_dir={data_dir} is not local: prepare on a disk, then copy it there")
    plan = make_plan(
        dataset,
        source,
        config_name,
        rules,
        selection=selection or Selection(),
        max_bad_fraction=max_bad_fraction,
    )
    final = Path(data_dir).expanduser().absolute() / plan.dataset / plan.config_name / VERSION
    if _exists(plan, final, overwrite):
        return final
    # Imported here: it takes seconds.
    import tensorflow_datasets as tfds

    from zephyr_jax.data.prepare.builders import BUILDERS

    builder_class, config = BUILDERS[dataset], plan.config_name
    if config not in builder_class.builder_configs:  # named by the user
        config = tfds.core.BuilderConfig(name=config)
    with storage.atomic_path(final, replace=overwrite) as temporary:
        builder = builder_class(config=config, data_dir=temporary)
        builder.write(plan, temporary, workers, beam)
        builder.info.write_to_directory(temporary)
    return final


def _exists(plan: Plan, final: Path, overwrite: bool) -> bool:
    """Whether the planned set is there; another one in its place is an error or overwritten."""
    if not final.exists():
        return False
    now, made_from = plan.identity(), {}
    try:
        made_from = report(final)["made_from"]
    except FileNotFoundError:
        pass  # something else is in the way
    except ValueError:
        if not overwrite:
            raise
    differing = [k for k in now | made_from if made_from.get(k) != now.get(k)]
    if not differing:
        logging.info("%s exists, made from the same files by the same rules.", final)
        return True
    if overwrite:
        return False
    raise ValueError(
        f"{final} holds another set ({', '.join(differing)} differ): give another data_dir, or "
        f"--overwrite to replace it"
    )


def set_folder(data_dir: str, name: str) -> epath.Path:
    """The folder of the newest version of a prepared set; a FileNotFoundError without any."""
    base = epath.Path(data_dir) / name
    versions = sorted(path.parent for path in base.glob("*/dataset_info.json"))
    if not versions:
        dataset, _, variant = name.partition("/")
        raise FileNotFoundError(
            f"no prepared set in {base}; make it with: python scripts/prepare_data.py {dataset} "
            f"--source=FOLDER --data_dir={data_dir} --config_name={variant or 'raw'}"
        )
    return versions[-1]


class Split(Sequence[Row]):
    """One split of a prepared set: plain dicts of str, float and lists, read on access."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a split of {len(self)} rows")
        return {key: _plain(value) for key, value in self._records[index % len(self)].items()}


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


def read_split(path: str | os.PathLike[str], split: str) -> Split:
    """The rows of one split of a prepared set, in their order on disk.

    Dialogues have `prompt`, `prompt_id` and `messages`, lists of {"role", "content"} and, of a turn
    that is only context, `"train": False`, of tools the keys that `raw.turns` names; pairs have
    `prompt`, `prompt_id`, `chosen`, `rejected`, `score_chosen`, `score_rejected` and `source`;
    unpaired answers `prompt`, `prompt_id`, `messages`, `label` (a bool) and `source`.
    """
    import tensorflow_datasets as tfds

    report(path)
    try:
        builder = tfds.builder_from_directory(os.fspath(path))
    except Exception as error:  # of several packages that read its JSON files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset_info.json or features.json in {path} is damaged ({reason:.200}): prepare the "
            "set again, with --overwrite"
        ) from error
    if split not in builder.info.splits:
        present = list(builder.info.splits)
        raise ValueError(
            f"{path} has no split {split!r}: it has {', '.join(present)}; prepare it with rows "
            "held out (--holdout), or train without evaluation: "
            f"--config.data.splits=\"('{present[0]}', '')\""
        )
    # The declared type of as_data_source is a decorator's and takes no arguments.
    records: Any = builder.as_data_source
    return Split(records(split))


def dataset_digest(path: str | os.PathLike[str]) -> str:
    """A SHA-256, in hex, of the records of all splits in their order, and of nothing else."""
    records = report(path)["records_sha256"]
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of how a prepared set was made: its `report.json`."""
    remedy = "prepare the set again, with --overwrite"
    try:
        return read_json(epath.Path(path) / REPORT, remedy, ("made_from", "rows", "records_sha256"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not a prepared data set (no {REPORT}): make one with prepare_data, and "
            f"give the folder that it names, data_dir/dataset/configuration/{VERSION}"
        ) from error
