"""The raw-data station: jsonl -> TFDS records that Grain reads, and the way back to dicts.

`prepare` makes a set, `read_split` reads one, `dataset_digest` names its content. TFDS is
imported only where it works, since that takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from absl import logging

from zephyr_jax.data.cleaning import CleaningRules
from zephyr_jax.data.preferences import CRITERIA, BinarizationRules
from zephyr_jax.data.rows import Row, Schema
from zephyr_jax.data.sources import find_sources
from zephyr_jax.data.staging import REPORT, VERSION, Plan
from zephyr_jax.data.ultrachat import schemas as ultrachat
from zephyr_jax.data.ultrafeedback import schemas as ultrafeedback

DATASETS = (ultrachat.NAME, ultrafeedback.NAME)


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    config_name: str = "raw",
    *,
    seed: int = 0,
    holdout: float = 0.1,
    sample: float = 1.0,
    cleaning: CleaningRules | None = None,
    binarization: BinarizationRules | None = None,
    max_bad_fraction: float = 0.01,
    drop_straddling: bool = False,
    overwrite: bool = False,
) -> Path:
    """The folder `data_dir/dataset/config_name/version` of a set, made unless it is there.

    The folder appears whole or not at all. A set that was made from the same files by the same
    rules is returned at once.

    Args:
      dataset: `ultrachat` or `ultrafeedback`.
      source: a folder of jsonl files (plain or .gz), one file, or a glob.
      data_dir: a local folder; made if missing.
      config_name: `raw`, or the published form: `200k` or `binarized`.
      seed: decides the held-out prompts and the sample (rejected answers go by the rules' seed).
      holdout: share of the prompts that is held out where files carry no published splits.
      sample: share of all prompts that is used.
      cleaning: for ultrachat raw.
      binarization: for ultrafeedback.
      max_bad_fraction: share of rows that may fail to fit the schema.
      drop_straddling: leave training rows out whose prompt is in the published held-out split.
      overwrite: replace a set that was made from other files or by other rules.

    Raises:
      FileNotFoundError: the source is not there.
      ValueError: names or shares are unknown or out of range, no file fits, too many rows do not
        fit, nothing is left, splits share a prompt, or another set stands in the way.
    """
    known = _schemas(dataset, config_name, cleaning, binarization)
    if "://" in os.fspath(data_dir):
        raise ValueError(f"data_dir={data_dir} is not local: prepare on a disk, then copy it there")
    plan = Plan(
        dataset=dataset,
        config_name=config_name,
        schema=known[config_name],
        sources=find_sources(source, known[config_name], known),
        seed=seed,
        holdout=holdout,
        sample=sample,
        max_bad_fraction=max_bad_fraction,
        drop_straddling=drop_straddling,
    )
    root = Path(data_dir).expanduser().absolute()
    final = root / dataset / config_name / VERSION
    if not _is_there(plan, final, overwrite):
        _build(plan, root, final, replace=final.exists())
    return final


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
    dataset: str,
    config_name: str,
    cleaning: CleaningRules | None,
    binarization: BinarizationRules | None,
) -> dict[str, Schema]:
    """The configurations of a data set by name; rules for the other data set are an error."""
    if dataset == ultrachat.NAME and binarization is None:
        known = ultrachat.schemas(cleaning)
    elif dataset == ultrafeedback.NAME and cleaning is None:
        known = ultrafeedback.schemas(binarization)
    elif dataset in DATASETS:
        raise ValueError(
            f"rules for the other data set given with {dataset}: cleaning goes with "
            f"{ultrachat.NAME}, binarization with {ultrafeedback.NAME}"
        )
    else:
        raise ValueError(f"no data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if config_name not in known:
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


def _build(plan: Plan, root: Path, final: Path, *, replace: bool) -> None:
    """Write the set beside its place and move it there whole."""
    # Imported here for two reasons: it takes seconds, and a builder class must be made only once.
    import tensorflow_datasets as tfds

    if plan.dataset == ultrachat.NAME:
        from zephyr_jax.data.ultrachat.builder import UltraChat as Builder
    else:
        from zephyr_jax.data.ultrafeedback.builder import UltraFeedback as Builder

    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".preparing-*"):
        logging.info("%s is of a run that was killed or is still going on.", stale)
    aside = Path(tempfile.mkdtemp(prefix=".preparing-", dir=root))
    try:
        builder = Builder(plan=plan, config=plan.config_name, data_dir=aside)
        # TFDS prints about downloads; there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_dir=aside / "downloads",
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
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
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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

    _report(path)
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
    records = _report(path)["records_sha256"]
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _report(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return json.loads((Path(path) / REPORT).read_text())
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is no prepared data set (no {REPORT}): make one with prepare_data, and give "
            f"the folder that it names, data_dir/dataset/configuration/{VERSION}"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument("dataset", choices=DATASETS)
    add = parser.add_argument
    add("--source", required=True, help="folder of jsonl or jsonl.gz files, one file, or a glob")
    add("--data_dir", required=True, help="the set goes to DATA_DIR/DATASET/CONFIG_NAME/VERSION")
    add(
        "--config_name",
        default="raw",
        help="raw (default), or the published form: 200k or binarized",
    )
    add("--seed", type=int, default=0, help="of held-out prompts, sample and rejected answers")
    add("--holdout", type=float, default=0.1, help="share of the prompts held out (default 0.1)")
    add("--sample", type=float, default=1.0, help="share of the prompts used (default 1)")
    add("--max_bad_fraction", type=float, default=0.01, help="of rows that may fail to fit (0.01)")
    add("--drop_straddling", action="store_true", help="drop training rows of held-out prompts")
    add("--overwrite", action="store_true", help="replace a set made otherwise")
    raw_chat = parser.add_argument_group("ultrachat, raw")
    raw_chat.add_argument("--no_truecase", action="store_true", help="leave capitals as they are")
    raw_chat.add_argument("--keep_refusals", action="store_true", help="drop no refusals")
    raw_chat.add_argument("--refusal_phrases", help="file with one phrase a line, for ours")
    pairs = parser.add_argument_group("ultrafeedback")
    pairs.add_argument("--criterion", choices=CRITERIA, help="raw only; default overall_score")
    pairs.add_argument("--no_score_repair", action="store_true", help="raw only; trust tens")
    pairs.add_argument("--drop_ties", action="store_true", help="drop pairs of equal score")


def run(args: argparse.Namespace) -> None:
    """Prepare what the command line asks for; log the place and what was kept and dropped.

    Raises:
      FileNotFoundError, ValueError: as `prepare`, and for options that would have no effect.
    """
    cleaning, binarization = _rules(args)
    path = prepare(
        args.dataset,
        args.source,
        args.data_dir,
        args.config_name,
        seed=args.seed,
        holdout=args.holdout,
        sample=args.sample,
        cleaning=cleaning,
        binarization=binarization,
        max_bad_fraction=args.max_bad_fraction,
        drop_straddling=args.drop_straddling,
        overwrite=args.overwrite,
    )
    report = _report(path)
    rows = report["rows"]
    counted = {"read": rows["read"], "bad": rows["bad"], **report["rules"]}
    counted.update({f"-> {split}": kept for split, kept in rows["kept"].items()})
    table = "\n".join(f"  {name:<24}{count:>10,}" for name, count in counted.items())
    logging.info("%s\n%s\n  details: %s", path, table, path / REPORT)


def _rules(args: argparse.Namespace) -> tuple[CleaningRules | None, BinarizationRules | None]:
    """The rules of the command line for its data set; what does not apply to it is an error."""
    home = {
        "no_truecase": (ultrachat.NAME, "raw"),
        "keep_refusals": (ultrachat.NAME, "raw"),
        "refusal_phrases": (ultrachat.NAME, "raw"),
        "criterion": (ultrafeedback.NAME, "raw"),
        "no_score_repair": (ultrafeedback.NAME, "raw"),
        "drop_ties": (ultrafeedback.NAME, args.config_name),
    }
    for option, (dataset, config_name) in home.items():
        if getattr(args, option) and (args.dataset, args.config_name) != (dataset, config_name):
            raise ValueError(
                f"--{option} has no effect on {args.dataset} {args.config_name}: it is for "
                f"{dataset} {config_name}"
            )
    if args.dataset == ultrafeedback.NAME:
        rules = BinarizationRules(
            criterion=args.criterion or CRITERIA[0],
            seed=args.seed,
            repair_scores=not args.no_score_repair,
            keep_ties=not args.drop_ties,
        )
        return None, rules
    phrases = CleaningRules.refusal_phrases
    if args.refusal_phrases:
        lines = Path(args.refusal_phrases).read_text(encoding="utf-8").splitlines()
        phrases = tuple(line.strip() for line in lines if line.strip())
    return CleaningRules(not args.no_truecase, not args.keep_refusals, phrases), None
