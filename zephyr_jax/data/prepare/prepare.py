"""The raw-data station: raw rows -> TFDS records that Grain reads, and the way back to dicts.

`prepare` makes a set, `read_split` reads one, `dataset_digest` names its content. TFDS is
imported only where it works, since that takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from absl import logging

from zephyr_jax.data.prepare.account import REPORT, UnfitRows
from zephyr_jax.data.prepare.parallel import available_cores, run_tasks
from zephyr_jax.data.prepare.plan import VERSION, Plan, Selection
from zephyr_jax.data.prepare.stages import Runner
from zephyr_jax.data.raw import own_dialogues as own_messages
from zephyr_jax.data.raw import own_pairs as own_preferences
from zephyr_jax.data.raw import ultrachat as ultrachat
from zephyr_jax.data.raw import ultrafeedback as ultrafeedback
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.filters import Filters
from zephyr_jax.data.raw.schema import Row, Schema
from zephyr_jax.data.raw.sources import find_sources

_WORTH_PROCESSES = 32 << 20  # bytes of raw rows


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set: its schemas by the rules that go with it, its builder, its rules' kind."""

    schemas: Callable[..., dict[str, Schema]]
    builder: str  # module and class
    rules: type
    default: str  # configuration
    named_by_user: bool = False


DATASETS = {
    ultrachat.NAME: Dataset(ultrachat.schemas, "ultrachat.builder:UltraChat", CleaningRules, "raw"),
    ultrafeedback.NAME: Dataset(
        ultrafeedback.schemas, "ultrafeedback.builder:UltraFeedback", BinarizationRules, "raw"
    ),
    own_messages.NAME: Dataset(
        own_messages.schemas, "own_messages.builder:Messages", CleaningRules, "own", True
    ),
    own_preferences.NAME: Dataset(
        own_preferences.schemas,
        "own_preferences.builder:Preferences",
        BinarizationRules,
        "own",
        True,
    ),
}


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    config_name: str | None = None,
    *,
    rules: CleaningRules | BinarizationRules | None = None,
    selection: Selection | None = None,
    filters: Filters | None = None,
    max_bad_fraction: float = 0.01,
    workers: int = 0,
    overwrite: bool = False,
    runner: Runner | None = None,
) -> Path:
    """The folder `data_dir/dataset/config_name/version` of a set, made unless it is there.

    The folder appears whole or not at all. A set that was made from the same files by the same
    rules is returned at once, and after a kill the same call goes on with what was finished.

    Args:
      dataset: `ultrachat`, `ultrafeedback`, or `messages` and `preferences` for one's own.
      source: a folder of jsonl (plain, .gz, .zst) or parquet files, one file, or a glob.
      data_dir: a local folder; made if missing.
      config_name: `raw` (the default), or the published form: `200k` or `binarized`. For one's
        own data any name (default `own`).
      rules: how rows become records: `CleaningRules` of dialogues, `BinarizationRules` of pairs.
      selection: which records are used, and for which split.
      filters: what else leaves records out.
      max_bad_fraction: share of rows that may fail to fit the schema.
      workers: processes; 0: one for each core, where there is enough to do.
      overwrite: replace a set that was made from other files or by other rules.
      runner: does the tasks instead of local processes; see `zephyr_jax.data.prepare.beam`.

    Raises:
      FileNotFoundError: the source is not there.
      ValueError: names or shares are unknown or out of range, no file fits, too many rows do not
        fit, nothing is left, splits share a prompt, another set stands in the way, or another
        process is making this one.
    """
    known = _schemas(dataset, config_name, rules)
    config_name = config_name or DATASETS[dataset].default
    if "://" in os.fspath(data_dir):
        raise ValueError(f"data_dir={data_dir} is not local: prepare on a disk, then copy it there")
    plan = Plan(
        dataset=dataset,
        config_name=config_name,
        schema=known[config_name],
        sources=find_sources(source, known[config_name], known),
        selection=selection or Selection(),
        filters=filters or Filters(),
        max_bad_fraction=max_bad_fraction,
    )
    root = Path(data_dir).expanduser().absolute()
    final = root / dataset / config_name / VERSION
    if _is_there(plan, final, overwrite):
        if _work(root, plan).exists():  # of a run that was killed right after it was through
            with contextlib.suppress(ValueError), _work_folder(root, plan):
                pass
    else:
        run = runner or functools.partial(run_tasks, workers=workers or _workers(plan))
        with _work_folder(root, plan) as work:
            if not _is_there(plan, final, overwrite):  # another process may just have made it
                _build(plan, work, final, run, replace=final.exists())
    return final


def _workers(plan: Plan) -> int:
    """A process for each core, unless starting them takes longer than the work."""
    size = sum(source.path.stat().st_size for source in plan.sources.files)
    return available_cores() if size > _WORTH_PROCESSES else 1


def _is_there(plan: Plan, final: Path, overwrite: bool) -> bool:
    """Whether the planned set is finished; another one in its place is an error or overwritten."""
    if not final.exists():
        return False
    differing = _differing(plan, final)
    if not differing:
        logging.info("%s is there already, made from the same files by the same rules.", final)
        return True
    if overwrite:
        return False
    raise ValueError(
        f"{final} was made otherwise ({', '.join(differing)} differ): give another data_dir, or "
        f"--overwrite to replace it"
    )


def _schemas(
    dataset: str, config_name: str | None, rules: CleaningRules | BinarizationRules | None
) -> dict[str, Schema]:
    """The configurations of a data set by name; rules of the other kind are an error."""
    if dataset not in DATASETS:
        raise ValueError(f"no data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    kind = DATASETS[dataset]
    if rules is not None and not isinstance(rules, kind.rules):
        raise ValueError(
            f"{type(rules).__name__} given with {dataset}, which goes by {kind.rules.__name__}"
        )
    known = kind.schemas(rules) if rules is not None else kind.schemas()
    if kind.named_by_user:
        name = config_name or kind.default
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"config_name={name!r}: name a set by letters, digits and . _ -")
        return {name: known[kind.default]}
    if config_name is not None and config_name not in known:
        raise ValueError(
            f"{dataset} has no configuration {config_name!r}: choose one of {', '.join(known)}"
        )
    return known


def _differing(plan: Plan, final: Path) -> list[str]:
    """What about a finished set is not as planned; "report.json" if it has none."""
    try:
        made_from = json.loads((final / REPORT).read_text())["made_from"]
    except (OSError, ValueError, KeyError):
        return [REPORT]
    wanted = plan.identity()
    return [key for key in wanted if made_from.get(key) != wanted[key]]


def _work(root: Path, plan: Plan) -> Path:
    return root / ".preparing" / f"{plan.dataset}-{plan.config_name}-{plan.digest}"


@contextlib.contextmanager
def _work_folder(root: Path, plan: Plan) -> Iterator[Path]:
    """The locked folder in which a set is made; it stays for a run that can go on, else it goes."""
    work = _work(root, plan)
    waiting = work.parent
    work.mkdir(parents=True, exist_ok=True)
    for other in waiting.iterdir():
        if other != work:
            logging.info(
                "%s is unfinished work of another command; delete it to free space.", other
            )
    if any(work.iterdir()):
        logging.info("Going on with what is finished in %s.", work)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ValueError(
            f"another process is making this very set in {work}: wait for it"
        ) from error
    try:
        yield work
        shutil.rmtree(work, ignore_errors=True)
    except UnfitRows:
        raise
    except ValueError:  # the input or the rules must change, and then this is of no use
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # others wait there
            waiting.rmdir()


def _build(plan: Plan, work: Path, final: Path, run: Runner, *, replace: bool) -> None:
    """Make the set in the folder of work and move it to its place whole."""
    # Imported here for two reasons: it takes seconds, and a builder class must be made only once.
    import tensorflow_datasets as tfds

    module, name = DATASETS[plan.dataset].builder.split(":")
    builder_class = getattr(importlib.import_module(f"zephyr_jax.data.{module}"), name)
    aside = work / "set"
    shutil.rmtree(aside, ignore_errors=True)
    config: Any = plan.config_name
    if config not in builder_class.builder_configs:  # a name of the user's own
        config = tfds.core.BuilderConfig(name=plan.config_name, description="As it was given.")
    builder = builder_class(plan=plan, work=work, run=run, config=config, data_dir=aside)
    # TFDS prints about downloads; there are none.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=aside / "downloads", file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    replaced = aside / "replaced"
    if replace:
        os.rename(final, replaced)
    try:
        os.rename(builder.data_dir, final)
    except OSError as error:
        if final.exists():
            raise ValueError(
                f"another process made {final} meanwhile: run again to check it, or use that"
            ) from error
        if replaced.exists():
            os.rename(replaced, final)
        raise


class Split(Sequence[Row]):
    """One split of a prepared set: plain dicts of str, float and lists, read when asked for."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
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
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
    return float(value)


def read_split(path: str | os.PathLike[str], split: str) -> Split:
    """The rows of one split of a prepared set, in their order on disk.

    UltraChat rows have `prompt`, `prompt_id` and `messages`; UltraFeedback rows have `prompt`,
    `prompt_id`, `chosen`, `rejected`, `score_chosen`, `score_rejected` and `source`. Messages are
    lists of {"role": str, "content": str}.

    Raises:
      FileNotFoundError: no prepared set is there.
      ValueError: the set has no such split.
    """
    import tensorflow_datasets as tfds

    report(path)
    builder = tfds.builder_from_directory(os.fspath(path))
    if split not in builder.info.splits:
        raise ValueError(f"{path} has no split {split!r}: it has {', '.join(builder.info.splits)}")
    # The declared type of as_data_source is a decorator's and takes no arguments.
    records: Any = builder.as_data_source
    return Split(records(split))


def dataset_digest(path: str | os.PathLike[str]) -> str:
    """A SHA-256, in hex, of the records of all splits in their order.

    It hangs on the content alone: the same input prepared again, elsewhere or later, has it too.

    Raises:
      FileNotFoundError: no prepared set is there.
    """
    records = report(path)["records_sha256"]
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The account of how a prepared set was made: its `report.json`.

    Raises:
      FileNotFoundError: no prepared set is there.
    """
    try:
        return json.loads((Path(path) / REPORT).read_text())
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is no prepared data set (no {REPORT}): make one with prepare_data, and give "
            f"the folder that it names, data_dir/dataset/configuration/{VERSION}"
        ) from error
