"""Which files hold the raw rows: their schemas, published splits and digests."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from zephyr_jax.data.raw import hub_sources
from zephyr_jax.data.raw.readers import SUFFIXES, first_row
from zephyr_jax.data.raw.schema import Schema


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of rows: its name in reports, its SHA-256, and the published split it holds."""

    path: Path
    name: str
    sha256: str
    split: str | None


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that fit a schema, in the order of their names, and why others were left out."""

    files: tuple[Source, ...]
    skipped: Mapping[str, str]
    origin: str = ""  # org/name@COMMIT of a set from the hub


def find_sources(
    source: str | os.PathLike[str], schema: Schema, siblings: Mapping[str, Schema] | None = None
) -> Sources:
    """The files that a folder, a file name or a glob stands for, of those that fit.

    Files of other schemas and of other published splits are skipped with one log line each. The
    published splits hold where both are present; a training file alone is split by prompt.

    Args:
      source: a folder (not searched deeper), one file, a pattern such as `raw/**/*.parquet`, or a
        hub id such as `HuggingFaceH4/ultrachat_200k@main`, which is downloaded.
      schema: what the first record of a file must look like.
      siblings: the data set's other configurations by name, to suggest in an error.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: nothing that is there fits.
    """
    found: list[tuple[Path, str, str | None]] = []
    skipped: dict[str, str] = {}
    advice = ""
    candidates, origin = _candidates(os.fspath(source), schema)
    for path, name in candidates:
        split = hub_sources.SPLIT_NAME.search(path.name)
        first = first_row(path)
        if not schema.fits(first):
            keys = ", ".join(list(first)[:8]) if isinstance(first, dict) else "no JSON object"
            skipped[name] = f"its first record has {keys}"
            fitting = [key for key, other in (siblings or {}).items() if other.fits(first)]
            advice = advice or (f"; try --config_name={fitting[0]}" if fitting else "")
        elif split is not None and split[0] not in schema.splits:
            skipped[name] = f"it holds the split {split[0]}, not {' or '.join(schema.splits)}"
        else:
            found.append((path, name, split[0] if split else None))
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"nothing in {source} has the keys {schema.wanted} ({reasons}){advice}")
    named = {split for _, _, split in found if split}
    published = named == set(schema.splits)
    if published:
        skipped.update({name: "no split in its name" for _, name, split in found if not split})
        found = [entry for entry in found if entry[2]]
    elif named:
        logging.info(
            "Only %s is published in %s: the held-out rows are drawn from what is there.",
            *named,
            source,
        )
    for name, why in skipped.items():
        logging.info("Skipped %s: %s.", name, why)
    files = [
        Source(path, name, _sha256(path), split if published else None)
        for path, name, split in found
    ]
    return Sources(tuple(files), skipped, origin)


def _candidates(source: str, schema: Schema) -> tuple[list[tuple[Path, str]], str]:
    """Files, the names that reports use for them, and the hub's name and commit if it has them.

    No name tells where a folder stands.
    """
    given = Path(source).expanduser()
    if given.is_file():
        _check_suffix(given)
        return [(given, given.name)], ""
    if given.is_dir():
        paths = sorted(path for path in given.iterdir() if path.name.endswith(SUFFIXES))
        root = given
        if not paths:
            held = ", ".join(sorted(path.name for path in given.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(
                f"no {', '.join(SUFFIXES)} file in {source} (it holds {held}); write other formats "
                f"out as one JSON object a line (jq -c '.[]' for a .json list), or name files in "
                f"deeper folders by a glob"
            )
    else:
        matches = glob.glob(str(given), recursive=True) if glob.has_magic(source) else []
        paths = sorted(path for path in map(Path, matches) if path.is_file())
        if not paths and hub_sources.is_hub_id(source):
            folder, names, origin = hub_sources.download_rows(source, schema.splits)
            return [(folder / name, name) for name in names], origin
        if not paths:
            raise FileNotFoundError(
                f"--source={source} is no folder, file, matching pattern or hub id (org/name); "
                f"give the folder that holds the jsonl or parquet files"
            )
        for path in paths:
            _check_suffix(path)
        root = Path(os.path.commonpath([path.parent for path in paths]))
    return [(path, path.relative_to(root).as_posix()) for path in paths], ""


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{path} is none of {', '.join(SUFFIXES)}: write it out as one JSON object a line "
            f"(jq -c '.[]' for a .json list)"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
