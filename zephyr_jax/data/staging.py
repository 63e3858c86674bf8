"""Raw rows -> converted rows in shards on disk, with a report of everything that happened.

One pass over the sources: rows that do not fit are counted by reason, the rules of the schema
convert, drop and count, and each kept row goes to its split. What is kept waits as JSON lines, a
file a shard, until the TFDS builder writes it; so memory holds a shard at most.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from zephyr_jax.data.rows import Row, Schema, selected
from zephyr_jax.data.sources import Source, Sources, parse, read_lines

# Of what TFDS writes. Raise it when the same input comes out different.
VERSION = "1.0.0"
REPORT = "report.json"
SHARD_ROWS = 25_000
SHARD_BYTES = 128 << 20
_EXAMPLES = 3

ShardIterators = dict[str, list[Callable[[], Iterator[tuple[int, Row]]]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides what a prepared set holds.

    `holdout` is the share of the prompts kept for evaluation where no published split says
    otherwise, `sample` the share of all prompts that is used. More than `max_bad_fraction` of
    rows that do not fit is an error. A prompt in both published splits is an error too, unless
    `drop_straddling` takes it out of the training split.
    """

    dataset: str
    config_name: str
    schema: Schema
    sources: Sources
    seed: int = 0
    holdout: float = 0.1
    sample: float = 1.0
    max_bad_fraction: float = 0.01
    drop_straddling: bool = False

    def __post_init__(self):
        for name, value, ok in (
            ("holdout", self.holdout, 0.0 <= self.holdout < 1.0),
            ("sample", self.sample, 0.0 < self.sample <= 1.0),
            ("max_bad_fraction", self.max_bad_fraction, 0.0 <= self.max_bad_fraction <= 1.0),
        ):
            if not ok:
                raise ValueError(f"{name}={value} is no share: give a number between 0 and 1")

    def identity(self) -> dict[str, Any]:
        """What decides the content, as JSON holds it: equal identities give equal sets."""
        return {
            "dataset": self.dataset,
            "config_name": self.config_name,
            "version": VERSION,
            "seed": self.seed,
            "holdout": self.holdout,
            "sample": self.sample,
            "drop_straddling": self.drop_straddling,
            "rules": json.loads(json.dumps(self.schema.rules)),
            "sources": {source.name: source.sha256 for source in self.sources.files},
        }


def stage(plan: Plan, directory: Path) -> ShardIterators:
    """For each split that has rows, a generator of (key, row) for each shard.

    Writes `report.json` into the directory and the waiting rows beneath it; a generator removes
    its file when it is through.

    Raises:
      ValueError: too many rows do not fit, nothing is left for training, or the published splits
        share a prompt.
    """
    staging = _Staging(plan, directory / "staging")
    staging.read()
    staging.check()
    (directory / REPORT).write_text(json.dumps(staging.report(), indent=1, ensure_ascii=False))
    total = sum(staging.kept.values())
    progress = tqdm(total=total, desc=f"writing {plan.dataset}", unit="row", mininterval=1.0)
    return {
        split: [functools.partial(_read_shard, path, progress) for path in writer.paths]
        for split, writer in staging.writers.items()
        if writer.paths
    }


def _read_shard(path: Path, progress: tqdm) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for key, line in enumerate(file):
            yield key, json.loads(line)
            progress.update()
    path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
        progress.close()


class _ShardWriter:
    """The waiting rows of one split: files of bounded size and a digest of all records."""

    def __init__(self, directory: Path, split: str):
        self.paths: list[Path] = []
        self.digest = hashlib.sha256()
        self._directory, self._split = directory, split
        self._file, self._rows, self._bytes = None, 0, 0

    def write(self, record: bytes) -> None:
        full = self._rows >= SHARD_ROWS or self._bytes >= SHARD_BYTES
        if self._file is None or full:
            self.close()
            self.paths.append(self._directory / f"{self._split}-{len(self.paths):05d}.jsonl")
            self._file, self._rows, self._bytes = self.paths[-1].open("wb"), 0, 0
        self._file.write(record)
        self.digest.update(record)
        self._rows += 1
        self._bytes += len(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Staging:
    """One pass over the sources of a plan, and the counts for its report."""

    def __init__(self, plan: Plan, directory: Path):
        directory.mkdir(parents=True)
        self.plan = plan
        self.read_by_source: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.rules: Counter[str] = Counter()
        self.bad: dict[str, list[str]] = {}
        self.bad_counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.writers = {split: _ShardWriter(directory, split) for split in plan.schema.splits}
        self._held_out: set[str] = set()

    def read(self) -> None:
        """Read every row once. The held-out files go first, so that training rows can be met."""
        _, held_out = self.plan.schema.splits
        files = sorted(self.plan.sources.files, key=lambda source: source.split != held_out)
        total = sum(source.path.stat().st_size for source in files)
        try:
            with tqdm(
                total=total, desc=f"reading {self.plan.dataset}", unit="B", unit_scale=True,
                mininterval=1.0,
            ) as bar:  # fmt: skip
                for source in files:
                    base = bar.n
                    lines = read_lines(source.path, lambda at, b=base: bar.update(b + at - bar.n))
                    for number, line in lines:
                        self.read_by_source[source.name] += 1
                        self._take(source, f"{source.name}:{number}", parse(line))
        finally:
            for writer in self.writers.values():
                writer.close()

    def _take(self, source: Source, where: str, row: Row | str) -> None:
        """One parsed line: count it as bad, dropped or kept."""
        if isinstance(row, str):
            return self._reject(row, where)
        schema = self.plan.schema
        missing = [key for key in schema.keys if key not in row]
        problem = f"missing_key:{missing[0]}" if missing else schema.problem(row)
        if problem is not None:
            return self._reject(problem, where)
        try:
            made, counts = schema.convert(row)
            record = json.dumps(made, ensure_ascii=False, sort_keys=True).encode() + b"\n"
        except UnicodeEncodeError:
            return self._reject("lone_surrogate", where)
        split = None if made is None else self._split(source, where, made["prompt_id"], counts)
        self.rules.update(counts)
        for rule in counts:
            shown = self.examples.setdefault(rule, [])
            if len(shown) < _EXAMPLES:
                before, after = schema.excerpt(rule, row, made if split else None)
                shown.append({"where": where, "before": before, "after": after})
        if split is not None:
            self.writers[split].write(record)
            self.kept[split] += 1
        return None

    def _reject(self, reason: str, where: str) -> None:
        self.bad_counts[reason] += 1
        if self.bad_counts[reason] <= _EXAMPLES:
            self.bad.setdefault(reason, []).append(where)

    def _split(
        self, source: Source, where: str, prompt_id: str, counts: Counter[str]
    ) -> str | None:
        """The split that a kept row goes to, by its file or by its prompt; None leaves it out."""
        plan = self.plan
        train, held_out = plan.schema.splits
        if source.split == train and prompt_id in self._held_out:
            if not plan.drop_straddling:
                raise ValueError(
                    f"{where}: the prompt {prompt_id} is in the split {held_out} too, so "
                    f"evaluation would see training text; --drop_straddling leaves such rows out "
                    f"of {train}"
                )
            counts["straddling"] += 1
            return None
        if plan.sample < 1.0 and not selected("sample", plan.seed, prompt_id, plan.sample):
            counts["sampled_out"] += 1
            return None
        if source.split == held_out:
            self._held_out.add(prompt_id)
        if source.split is not None:
            return source.split
        return held_out if selected("holdout", plan.seed, prompt_id, plan.holdout) else train

    def check(self) -> None:
        """Raise if too much was bad or nothing is left; warn of what was bad."""
        read, bad = sum(self.read_by_source.values()), sum(self.bad_counts.values())
        shown = "; ".join(
            f"{reason} {count} ({', '.join(self.bad[reason])})"
            for reason, count in self.bad_counts.most_common(4)
        )
        if bad > self.plan.max_bad_fraction * read:
            raise ValueError(
                f"{bad} of {read} rows do not fit, more than max_bad_fraction="
                f"{self.plan.max_bad_fraction:g}: {shown}"
            )
        if bad:
            logging.warning("%d of %d rows do not fit: %s.", bad, read, shown)
        train, held_out = self.plan.schema.splits
        if not self.kept[train]:
            raise ValueError(
                f"none of the {read} rows read is left for {train}: "
                + (", ".join(f"{rule} {n}" for rule, n in self.rules.most_common()) or "no rules")
                + f"; {held_out} has {self.kept[held_out]}: give more rows, or fewer rules"
            )
        if not self.kept[held_out]:
            logging.warning("No row fell into %s: the set has no such split.", held_out)

    def report(self) -> dict[str, Any]:
        """What was read, kept, dropped and changed, as JSON holds it."""
        published = any(source.split for source in self.plan.sources.files)
        return {
            "made_from": self.plan.identity(),
            "splits_by": "file names" if published else "prompt_id",
            "rows": {
                "read": sum(self.read_by_source.values()),
                "bad": sum(self.bad_counts.values()),
                "kept": {split: self.kept[split] for split in self.plan.schema.splits},
            },
            "read_by_source": dict(sorted(self.read_by_source.items())),
            "skipped": dict(self.plan.sources.skipped),
            "rules": dict(self.rules.most_common()),
            "bad": {
                reason: {"count": count, "first": self.bad[reason]}
                for reason, count in self.bad_counts.most_common()
            },
            "examples": self.examples,
            "records_sha256": {
                split: writer.digest.hexdigest() for split, writer in self.writers.items()
            },
        }
