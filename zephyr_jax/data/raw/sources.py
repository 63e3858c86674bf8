"""The files that hold raw rows, on disk or in a data set of the hub, and their rows in chunks.

A file is jsonl (plain, .gz, .zst) or parquet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from zephyr_jax import hub
from zephyr_jax.data.raw.schema import Row, Schema

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 16 << 20
_BATCH_ROWS = 256  # of parquet that are Python objects at once
_SPLIT = re.compile(r"(?<![a-z0-9])(?:train|test)_(?:sft|prefs|gen)(?![a-z])")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@\S*)?")
# The revision of raw UltraChat that is read unless another one is named.
ULTRACHAT_REVISION = "f220fe796ce3ed62fbe1681b45ce6cbc9c6cabe0"
# The rows by split of published sets, of one revision or else of main when they were counted.
_ULTRACHAT, _PAPER = {"train": 1_468_348}, "292c16329d921287c4166934cac1a6ad1e13a6c5"
PUBLISHED_ROWS = {
    "stingning/ultrachat": _ULTRACHAT,
    "openbmb/ultrachat": _ULTRACHAT,
    "huggingfaceh4/ultrachat_200k": {"train_sft": 207_865, "test_sft": 23_110},
    "openbmb/ultrafeedback": {"train": 63_967},
    "huggingfaceh4/ultrafeedback_binarized": {"train_prefs": 61_135, "test_prefs": 2_000},
    f"huggingfaceh4/ultrafeedback_binarized@{_PAPER}": {"train_prefs": 61_966, "test_prefs": 2_000},
    "trl-lib/ultrafeedback_binarized": {"train": 62_135, "test": 1_000},
    "argilla/ultrafeedback-binarized-preferences": {"train": 63_619},
    "argilla/ultrafeedback-binarized-preferences-cleaned": {"train": 60_917},
    "allenai/ultrafeedback_binarized_cleaned": {"train_prefs": 60_829},
}
_ANY_SPLIT = re.compile(r"(?<![a-z0-9])(?:train|test)(?:_(?:sft|prefs|gen))?(?![a-z])")
_AS_LINES = "write it out as one JSON object a line (jq -c '.[]' for a .json list)"


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of rows: its name in reports, its SHA-256, and the published split it holds."""

    path: Path
    name: str
    sha256: str
    split: str | None


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that fit a schema, in the order of their names, and why others were skipped."""

    files: tuple[Source, ...]
    skipped: Mapping[str, str]
    origin: str = ""  # org/name@COMMIT of a set from the hub


def find_sources(
    source: str | os.PathLike[str], schema: Schema, siblings: Mapping[str, Schema] | None = None
) -> Sources:
    """The files that fit a schema among those that a folder, file name, glob or hub id names.

    Files of other schemas and of other published splits are skipped with one log line each. The
    published splits hold where both are present; a training file alone is split by prompt. Errors
    suggest one of the `siblings`, the data set's other configurations.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: nothing that is there fits.
    """
    candidates, origin = _candidates(os.fspath(source), schema)
    fitting: dict[str, tuple[Path, str | None]] = {}
    skipped: dict[str, str] = {}
    others: list[str] = []
    for name, path in candidates.items():
        split = _SPLIT.search(path.name)
        first = _first_row(path)
        if not schema.fits(first):
            skipped[name] = f"its first record has {', '.join(list(first)[:8]) or 'no JSON object'}"
            others += [key for key, other in (siblings or {}).items() if other.fits(first)]
        elif split is not None and split[0] not in schema.splits:
            skipped[name] = f"it holds the split {split[0]}, not {' or '.join(schema.splits)}"
        else:
            fitting[name] = (path, split[0] if split else None)
    if not fitting:
        wanted = " or ".join(", ".join(shape) for shape in schema.shapes)
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        advice = f"; try --config_name={others[0]}" if others else ""
        raise ValueError(f"nothing in {source} has the keys {wanted} ({reasons}){advice}")
    splits = {split for _, split in fitting.values() if split}
    both = splits == set(schema.splits)
    if both:
        unnamed = [name for name, (_, split) in fitting.items() if not split]
        skipped |= dict.fromkeys(unnamed, "no split in its name")
    elif splits:
        logging.info("%s holds only %s: held-out rows are drawn from it.", source, *splits)
    for name, reason in skipped.items():
        logging.info("Skipped %s: %s.", name, reason)
    files = []
    for name, (path, split) in fitting.items():
        if name not in skipped:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files.append(Source(path, name, digest, split if both else None))
    return Sources(tuple(files), skipped, origin)


def _first_row(path: Path) -> Row:
    """The first row of a file that can be parsed; empty if its first lines hold none."""
    rows = itertools.chain.from_iterable(map(read_rows, chunks_of(path)[:1]))
    return next((row for row in itertools.islice(rows, 20) if isinstance(row, dict)), {})


def _candidates(source: str, schema: Schema) -> tuple[dict[str, Path], str]:
    """The files by their names below the folder, and `org/name@COMMIT` of a set from the hub."""
    place = Path(source).expanduser()
    paths, root = [place], place.parent
    if place.is_dir():
        paths, root = sorted(x for x in place.iterdir() if x.name.endswith(SUFFIXES)), place
        if not paths:
            present = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(
                f"no {', '.join(SUFFIXES)} file in {source} (it holds {present}): of another "
                f"format {_AS_LINES}; name files in deeper folders by a glob"
            )
    elif not place.is_file():
        matches = glob.glob(str(place), recursive=True) if glob.has_magic(source) else []
        paths = sorted(path for path in map(Path, matches) if path.is_file())
        if not paths and _HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
            return _download(source, schema.splits)
        if not paths:
            raise FileNotFoundError(
                f"--source={source} is not a folder, file, matching pattern or hub id (org/name); "
                "give the folder that holds the jsonl or parquet files"
            )
        root = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}: {_AS_LINES}")
    return {path.relative_to(root).as_posix(): path for path in paths}, ""


def _download(source: str, splits: Sequence[str]) -> tuple[dict[str, Path], str]:
    """The files of `org/name` or `org/name@REVISION`, and `org/name@COMMIT`."""
    name, revision = hub.split_name(source)
    if revision is None and name.lower() in ("stingning/ultrachat", "openbmb/ultrachat"):
        revision = ULTRACHAT_REVISION
    # The client lists a data set's files when it fetches one of them, and remembers the list.
    commit = hub.fetch(name, revision, ["README.md"], "dataset").name
    listed = hub.listed_files(name, commit, "dataset")
    files = wanted_files(listed, splits)
    if not files:
        present = ", ".join(listed[:5]) or "nothing"
        raise FileNotFoundError(
            f"{name} has no {', '.join(SUFFIXES)} file of {' or '.join(splits)} "
            f"(it holds {present})"
        )
    if len({file.endswith(".parquet") for file in files}) > 1:
        logging.warning("%s has jsonl and parquet: if they hold the same rows, drop one kind", name)
    folder = hub.fetch(name, commit, files, "dataset")
    logging.info("%s at %s is in %s", name, commit, folder)
    return {file: folder / file for file in files}, f"{name}@{commit}"


def wanted_files(listed: Sequence[str], splits: Sequence[str]) -> list[str]:
    """The files of a data set that hold rows of the splits, in the order of their names.

    They are all jsonl and parquet files but the hub's partial conversions and other splits.
    """
    files = []
    for file in sorted(listed):
        partial = any(folder.startswith("partial-") for folder in file.split("/")[:-1])
        split = _SPLIT.search(Path(file).name)
        if file.endswith(SUFFIXES) and not partial and (split is None or split[0] in splits):
            files.append(file)
    return files


def odd_row_counts(origin: str, read: Mapping[str, int]) -> str:
    """How the rows read of the files of a published set differ from `PUBLISHED_ROWS`, or ""."""
    name, counts = origin.lower(), Counter[str]()
    for file, rows in read.items():
        split = _ANY_SPLIT.search(Path(file).name)
        counts[split[0] if split else "train"] += rows
    published = PUBLISHED_ROWS.get(name) or PUBLISHED_ROWS.get(name.partition("@")[0], {})
    odd = {split: rows for split, rows in published.items() if counts.get(split, rows) != rows}
    parts = [f"{counts[split]:,} rows in {split} instead of {n:,}" for split, n in odd.items()]
    return f"{origin} has {', '.join(parts)}" if odd else ""


class Chunk(NamedTuple):
    """Part of a file: the lines that begin in bytes `start` to `stop`, or a parquet row group.

    A compressed file can only be read from its beginning and is one chunk.
    """

    path: Path
    start: int
    stop: int


def chunks_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """The chunks of a file in their order: about `chunk_bytes` of lines, or a row group."""
    if path.name.endswith(".parquet"):
        with _explained(path), pq.ParquetFile(path) as file:
            return [Chunk(path, at, at + 1) for at in range(file.metadata.num_row_groups)]
    size = path.stat().st_size
    if not path.name.endswith(".jsonl"):
        return [Chunk(path, 0, size)]
    starts = range(0, size, chunk_bytes)
    return [Chunk(path, at, min(at + chunk_bytes, size)) for at in starts]


def read_rows(chunk: Chunk) -> Iterator[Row | str | None]:
    """Each row of a chunk: the parsed object, the reason why there is none, None for a blank line.

    A damaged file is a ValueError.
    """
    with _explained(chunk.path):
        if not chunk.path.name.endswith(".parquet"):
            for line in _lines(chunk):
                yield None if line.isspace() else _parse(line)
            return
        with pq.ParquetFile(chunk.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, list(range(chunk.start, chunk.stop))):
                yield from batch.to_pylist()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        message = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged ({message}): download it again") from error


def _parse(line: bytes) -> Row | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "bad_json"
    return row if isinstance(row, dict) else "not_an_object"


def _lines(chunk: Chunk) -> Iterator[bytes]:
    with chunk.path.open("rb") as raw:
        if chunk.path.name.endswith(".gz"):
            yield from gzip.GzipFile(fileobj=raw)
        elif chunk.path.name.endswith(".zst"):
            yield from io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))  # type: ignore
        else:
            start = chunk.start
            if start:
                raw.seek(start - 1)
                start += len(raw.readline()) - 1  # the rest of an earlier line; its own newline
            while start < chunk.stop and (line := raw.readline()):
                yield line
                start += len(line)
