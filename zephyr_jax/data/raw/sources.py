"""The files that hold raw rows, on disk or in a data set of the hub, and the split of each."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from huggingface_hub import metadata_load

from zephyr_jax import hub
from zephyr_jax.data.raw.readers import AS_LINES, SUFFIXES, numbered_rows
from zephyr_jax.data.raw.schema import Schema
from zephyr_jax.storage import MANIFEST, file_info, verify

_SPLIT = re.compile(r"(?<![a-z0-9])(?:train|test)_(?:sft|prefs|gen)(?![a-z])")
# Words of a path that name a split; letters around them make another word ("latest", "devices").
_HELD_OUT = "test(?:ing)?|valid(?:ation)?|val|dev|eval(?:uation)?|(?:held|hold)[_. -]?out"
_ROLE = re.compile(rf"(?<![^\W\d_])(?:(train)|{_HELD_OUT})(?:s|sets?|split|data)?(?![^\W\d_])")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Descriptions of a set, which are JSON and no rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The revision of raw UltraChat that is read unless another one is named.
ULTRACHAT_REVISION = "f220fe796ce3ed62fbe1681b45ce6cbc9c6cabe0"


class Source(NamedTuple):
    """One file of rows: its name in reports, its SHA-256, and the published split it holds."""

    path: Path
    name: str
    sha256: str
    split: str | None


class Sources(NamedTuple):
    """The files that fit a schema, in the order of their names, and why others were skipped."""

    files: tuple[Source, ...]
    skipped: Mapping[str, str]
    origin: str = ""  # org/name@COMMIT of a set from the hub


def find_sources(source: str | os.PathLike[str], schema: Schema) -> Sources:
    """The files that fit a schema among those that a folder, file name, glob or hub id names.

    Others are skipped with one log line each. A file whose name says that it is held out stays so,
    and then all others are training files; where none is held out, rows are drawn by prompt.
    """
    candidates, labels, origin = _candidates(os.fspath(source), schema)
    for path in candidates.values():
        if (path.parent / MANIFEST).is_file():  # of collect_feedback; its rows may be edited
            remedy = "make it again, unless it was changed on purpose"
            try:
                verify(path.parent, [path.name], remedy=remedy)
            except ValueError as error:
                logging.warning("%s", error)
    skipped: dict[str, str] = {}
    for name, path in candidates.items():
        rows = [row for _, row in itertools.islice(numbered_rows(path), 20)]
        objects = [row for row in rows if isinstance(row, dict)]
        # The first row that fits, or else that can be parsed, or is there.
        first = next(iter([*filter(schema.fits, objects), *objects, *rows]), None)
        split = _SPLIT.search(labels[name])
        if first is None:
            skipped[name] = "it has no rows"
        elif isinstance(first, str):
            skipped[name] = f"its first row is {first}"
        elif not schema.fits(first):
            skipped[name] = f"its first record has {', '.join(list(first)[:8]) or 'no key'}"
        elif split is not None and split[0] not in schema.splits:
            skipped[name] = f"it holds the split {split[0]}, not {' or '.join(schema.splits)}"
    fitting = {name: labels[name] for name in candidates if name not in skipped}
    if not fitting:
        wanted = " or ".join(", ".join(shape) for shape in schema.shapes)
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"nothing in {source} has the keys {wanted} ({reasons})")
    for name, reason in skipped.items():
        logging.warning("Skipped %s: %s.", name, reason)
    files = [
        Source(candidates[name], name, file_info(candidates[name], "sha256")["sha256"], split)
        for name, split in _splits_of(source, fitting, schema.splits).items()
    ]
    return Sources(tuple(files), skipped, origin)


def split_words(name: str) -> dict[str, bool]:
    """The words of a path that name a split, and whether it is the training split."""
    separated = _CAMEL.sub("_", name) if not name.islower() else name
    return {match[0]: bool(match[1]) for match in _ROLE.finditer(separated.lower())}


def _splits_of(
    source: Any, labels: Mapping[str, str], splits: tuple[str, str]
) -> dict[str, str | None]:
    """The split of each file, None where no name decides; logs what was decided."""
    held: dict[str, bool] = {}
    for name, label in labels.items():
        words = split_words(label)
        if len({*words.values()}) > 1:
            raise ValueError(
                f"{label} in {source} names both {' and '.join(words)}, so its split is not clear: "
                "rename the file or its folder, or name other files by a glob"
            )
        held[name] = False in words.values()
    if all(held.values()):
        raise ValueError(
            f"{source} has held-out rows alone, by the name of {', '.join(list(held)[:3])}: there "
            "is nothing to train on; add a training file, or rename the file that is one"
        )
    decided = {name: splits[out] if any(held.values()) else None for name, out in held.items()}
    for name, split in decided.items():
        how = "by its name" if split_words(labels[name]) else "as its name holds nothing out"
        logging.info("%s: %s.", name, f"{split}, {how}" if split else "split by prompt (--holdout)")
    return decided


def _candidates(source: str, schema: Schema) -> tuple[dict[str, Path], dict[str, str], str]:
    """The files by their names, the label that tells the split of each, and `org/name@COMMIT`."""
    place = Path(source).expanduser()
    if place.is_dir():
        paths, root = _files_in(place), place
    elif place.exists():
        paths, root = [place], place.parent
    else:
        # What is there by its literal name is no pattern, whatever the characters in it.
        root = next(parent for parent in place.parents if parent.exists())
        matches = glob.glob(str(place.relative_to(root)), root_dir=root, recursive=True)
        paths = sorted(path for path in (root / match for match in matches) if _is_file(path))
        if not paths:
            expected = "a folder, file or matching pattern, or a hub id (org/name)"
            hub.check_name(source, f"--source={source} is not {expected}")
            return _download(source, schema.splits)
    for path in paths:
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}: {AS_LINES}")
    files = {path.relative_to(root).as_posix(): path for path in paths}
    return files, dict(zip(files, files, strict=True)), ""


def _has_rows(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name.split("/")[-1] not in _METADATA


def _is_file(path: Path) -> bool:
    """Whether a path is a file; a FileNotFoundError for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        why = f"{path} is a link to {path.readlink()}, which is not there"
        raise FileNotFoundError(f"{why}: put that back, or remove the link")
    return path.is_file()


def _files_in(folder: Path) -> list[Path]:
    """The files with rows in a folder, or, where it has none, in the folders of it and of these."""
    deep = sorted(
        path
        for pattern in ("*", "*/*", "*/*/*")
        for path in folder.glob(pattern)
        if "/." not in f"/{path.relative_to(folder).as_posix()}" and _is_file(path)
    )
    paths = [path for path in deep if _has_rows(path.name)]
    if not paths:
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"no {', '.join(SUFFIXES)} file in {folder} (it holds {present}): {AS_LINES}; name "
            "files in deeper folders by a glob"
        )
    paths = [path for path in paths if path.parent == folder] or paths
    read, present = ({p.relative_to(folder).parts[0] for p in some} for some in (paths, deep))
    if unread := ", ".join(sorted(present - read - {*_METADATA})):
        logging.warning("Not read in %s: %s (a glob names others).", folder, unread)
    return paths


def _download(source: str, splits: Sequence[str]) -> tuple[dict[str, Path], dict[str, str], str]:
    """As `_candidates`, of `org/name` or `org/name@REVISION`, without the files of other splits."""
    name, revision = hub.split_name(source)
    if revision is None and name.lower() in ("stingning/ultrachat", "openbmb/ultrachat"):
        revision = ULTRACHAT_REVISION
    folder, listed = hub.fetch(name, revision, ["README.md"], "dataset")
    card, commit = folder / "README.md", folder.name
    labels = dict(zip(listed, listed, strict=True))
    labels |= _declared(metadata_load(card) if card.is_file() else None, listed)
    files = []
    for file, label in sorted(labels.items()):
        is_copy, split = "/partial-" in f"/{file}", _SPLIT.search(label)
        if _has_rows(file) and not is_copy and (split is None or split[0] in splits):
            files.append(file)
    if not files:
        present = ", ".join(listed[:5]) or "nothing"
        wanted = f"{', '.join(SUFFIXES)} file of {' or '.join(splits)}"
        raise FileNotFoundError(f"{name} has no {wanted} (it holds {present})")
    folder, _ = hub.fetch(name, commit, files, "dataset")
    logging.info("%s at %s is in %s", name, commit, folder)
    return {file: folder / file for file in files}, labels, f"{name}@{commit}"


def _declared(metadata: Any, files: Sequence[str]) -> dict[str, str]:
    """SPLIT/FILE of the files that the metadata of a set's card has in a split."""
    declared = {}
    for config in (metadata or {}).get("configs") or []:
        entries = config.get("data_files")
        for entry in entries if isinstance(entries, list) else []:
            paths = entry.get("path") if isinstance(entry, dict) else None
            for pattern in [paths] if isinstance(paths, str) else paths or []:
                for file in fnmatch.filter(files, pattern):
                    declared[file] = f"{entry.get('split', 'train')}/{file}"
    return declared
