"""Raw rows from the Hugging Face hub: which files of a data set to take, and the taking.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from zephyr_jax import hub as hub_transfer
from zephyr_jax._version import __version__
from zephyr_jax.data.raw.published import PARTIAL_ULTRACHAT, PUBLISHED, check_rows, published
from zephyr_jax.data.raw.readers import SUFFIXES
from zephyr_jax.hub import NetworkError, cause_of, explained, is_passing, patiently

SPLIT_NAME = re.compile(r"(?<![a-z0-9])(?:train|test)_(?:sft|prefs|gen)(?![a-z])")
_PLAIN_SPLIT = re.compile(r"(?<![a-z0-9])(?:train|test)(?![a-z])")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@\S*)?")


def is_hub_id(source: str) -> bool:
    """Whether a source that is nothing on this machine has the shape of a hub id.

    >>> [is_hub_id(s) for s in ("org/name", "org/name@main", "a/b/c", "./a", "x.jsonl", "a/*")]
    [True, True, False, False, False, False]
    """
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(SUFFIXES)


def download_rows(source: str, splits: Sequence[str]) -> tuple[Path, list[str], str]:
    """A data set's folder in the client's cache, the files in it to read, and `org/name@COMMIT`.

    Of a published set (`published.py`) the files known to hold its rows are taken, at
    its revision unless another is named; of others all jsonl and parquet files. Files of splits
    that nobody asked for stay where they are. A download that was cut off goes on.

    Args:
        source: `org/name`, or `org/name@REVISION`.
        splits: the splits that are read; where file names carry others, these are left out.

    Raises:
        FileNotFoundError: there is no such set or revision, this account may not read it, it has
            no rows in a known format, or it can neither be fetched nor found in the cache.
        ValueError: no revision follows an @.
    """
    name, revision = hub_transfer.split_name(source)
    entry = published(name)
    if revision is None and entry is not None and entry.revision != "main":
        revision = entry.revision
        logging.info("%s is read at its known revision %s", name, revision)
    cached = None
    try:
        cached = _cached(name, revision, splits)
        if cached is not None and cached[0].name == revision:  # what a commit holds never changes
            return *cached, f"{name}@{revision}"
        tries = 1 if cached else hub_transfer.TRIES
        folder, files = _download(name, revision, splits, tries)
        return folder, files, f"{name}@{folder.name}"
    except (NetworkError, OSError, HFValidationError) as error:
        cause = cause_of(error)
        if isinstance(error, NoRows):
            raise
        if cached is None or not is_passing(cause):
            raise explained(name, revision, cause, "dataset") from error
    logging.warning(
        "%s cannot be reached; %s at %s is taken from the cache",
        constants.ENDPOINT,
        name,
        cached[0].name,
    )
    return *cached, f"{name}@{cached[0].name}"


class NoRows(FileNotFoundError):
    """A data set without a file that could be read."""


def _download(
    name: str, revision: str | None, splits: Sequence[str], tries: int
) -> tuple[Path, list[str]]:
    api = HfApi(library_name="zephyr_jax", library_version=__version__)
    ask = functools.partial(api.dataset_info, name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    info = patiently(functools.partial(ask, revision=revision), tries)
    listed = sorted(file.rfilename for file in info.siblings or ())
    files = wanted_files(name, listed, splits)
    if not files:
        held = ", ".join(listed[:5]) or "nothing"
        raise NoRows(
            f"{name} has no {', '.join(SUFFIXES)} file of {' or '.join(splits)} (it holds {held})"
        )
    _warn_of_missing(name, listed)
    commit = str(info.sha)
    hub_transfer.fetch(name, commit, files, tries, "dataset")
    get = functools.partial(hf_hub_download, name, repo_type="dataset", revision=commit)
    linked = [Path(patiently(functools.partial(get, file), tries)) for file in files]
    folder = linked[0].parents[files[0].count("/")]
    _note(_list_of(folder, splits), json.dumps(files))
    if revision != commit:  # last: until now the cache's branch is the copy before, which is whole
        _note(folder.parents[1] / "refs" / (revision or "main"), commit)
    logging.info("%s at %s is in %s", name, folder.name, folder)
    return folder, files


def _note(path: Path, text: str) -> None:
    """A small file of the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def _warn_of_missing(name: str, listed: Sequence[str]) -> None:
    entry = published(name)
    named = [file for file in entry.files if "*" not in file] if entry else []
    if missing := [file for file in named if file not in listed]:
        logging.warning("%s lacks %s at this revision", name, ", ".join(missing))


def wanted_files(name: str, listed: Sequence[str], splits: Sequence[str]) -> list[str]:
    """The files of a data set that hold its rows, in the order of their names.

    >>> wanted_files("org/x", ["README.md", "b.jsonl", "data/test_gen-0.parquet"], ["train_sft"])
    ['b.jsonl']
    >>> files = ["train_0.jsonl", "default/partial-train/0000.parquet"]
    >>> wanted_files("openbmb/UltraChat", files, ["train_sft"])
    ['train_0.jsonl']
    """
    entry = published(name)
    rows = [f for f in sorted(listed) if f.endswith(SUFFIXES)]
    rows = [f for f in rows if not any(p.startswith("partial-") for p in f.split("/")[:-1])]
    found = {f: SPLIT_NAME.search(Path(f).name) for f in rows}
    rows = [f for f in rows if found[f] is None or found[f][0] in splits]  # type: ignore[index]
    patterns = entry.files if entry else ()
    known = [f for f in rows if any(fnmatch.fnmatchcase(f, p) for p in patterns)]
    if known:
        return known
    if len({f.endswith(".parquet") for f in rows}) > 1:
        logging.warning(
            "%s has jsonl and parquet, and all is read; if they are the same rows, use "
            "--duplicates=exact, or download one kind and name the folder",
            name,
        )
    return rows


def _cached(
    name: str, revision: str | None, splits: Sequence[str]
) -> tuple[Path, list[str]] | None:
    """The folder and the files of a revision where the cache has all of them."""
    try:
        where = snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    folder = Path(where)
    try:
        files = json.loads(_list_of(folder, splits).read_text())
    except (OSError, ValueError):
        return None
    return (folder, files) if all((folder / file).exists() for file in files) else None


def _list_of(folder: Path, splits: Sequence[str]) -> Path:
    """Where a finished download has left the names of its files, for a time without network."""
    return folder.parents[1] / "zephyr_jax" / f"{folder.name}-{'-'.join(splits)}.json"


def odd_rows(origin: str, dataset: str, config_name: str, counts: Mapping[str, int]) -> str | None:
    """What is odd about the number of rows read, in one line, or None.

    Raises:
        ValueError: they are the 773,913 of the hub's partial copy of UltraChat.
    """
    name, _, revision = origin.partition("@")
    entry = published(name) if name else None
    if (dataset, config_name) == ("ultrachat", "raw") and sum(counts.values()) == PARTIAL_ULTRACHAT:
        raw = next(s for s in PUBLISHED if (s.dataset, s.config_name) == (dataset, config_name))
        raise ValueError(check_rows(raw, revision, counts))
    if entry is None or (entry.dataset, entry.config_name) != (dataset, config_name):
        return None
    known = revision == entry.revision or revision in entry.other_rows
    return check_rows(entry, revision if known else "main", counts)


def split_of(file: str) -> str:
    """The published split that a file name tells, `train` where it tells none.

    >>> [split_of(f) for f in ("data/test-00000-of-00001.parquet", "train_3.jsonl", "flan.jsonl")]
    ['test', 'train', 'train']
    >>> split_of("data/test_prefs-00000-of-00001.parquet")
    'test_prefs'
    """
    found = SPLIT_NAME.search(Path(file).name) or _PLAIN_SPLIT.search(Path(file).name)
    return found[0] if found else "train"
