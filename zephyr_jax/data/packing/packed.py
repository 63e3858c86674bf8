"""The packed set on disk: rows in ArrayRecord files, in a folder named by all that shaped them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled
from etils import epath
from tqdm import tqdm

from zephyr_jax import storage
from zephyr_jax.config import require
from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import documents, packing
from zephyr_jax.data.packing.documents import Documents, Rendering
from zephyr_jax.data.packing.plan import SplitPlan, plan_rows, usable_documents
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.text.tokenizer import Tokenizer

FORMAT = 5  # of the packed files; a change of layout or of rendering raises it


class RowSource:
    """Random access to the rows of one split."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype, self._records = path, dtype, ArrayRecordDataSource(str(path))

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at these indices, as a structured array; an index of -1 gives an empty row."""
        rows = np.zeros(len(indices), self._dtype)
        real = [(at, int(i)) for at, i in enumerate(indices) if i >= 0]
        try:
            records = self._records.__getitems__([i for _, i in real]) if real else []
        except RuntimeError as error:  # by the file's own checksums; it was whole at the start
            raise OSError(f"{self._path}: {error}; {_remedy(self._path.parent)}") from error
        for (at, _), record in zip(real, records, strict=True):
            rows[at] = np.frombuffer(record, self._dtype)[0]
        return rows


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A complete packed set on disk."""

    folder: Path
    # `splits` has rows, documents, tokens, target_tokens, padding_share and counts of what was cut
    # or dropped; sets of preferences also have rows_per_batch (R) and pairs_per_row (K).
    manifest: dict[str, Any]
    home: str = ""  # the URL of which this is a local copy, if it is one

    def rows(self, split: str) -> RowSource:
        """The rows of "train" or "eval"."""
        dtype = packing.row_dtype(self.manifest["seq_len"], self.manifest["pairs_per_row"])
        return RowSource(self.folder / f"{split}.array_record", dtype)

    def pair_ids(self, split: str) -> np.ndarray:
        """The pair ids of all rows, `rows K` int64, 0 for none: what every process must know."""
        if not self.manifest["pairs_per_row"]:
            return np.zeros((self.manifest["splits"][split]["rows"], 0), np.int64)
        return np.load(self.folder / f"{split}-pairs.npz")["rows"]

    def sources(self, split: str) -> dict[int, str]:
        """Pair id -> where the pair came from, "" where its record does not say."""
        with np.load(self.folder / f"{split}-pairs.npz") as stored:
            return dict(zip(stored["ids"].tolist(), stored["sources"].tolist(), strict=True))

    def ties(self, split: str) -> np.ndarray:
        """The ids of the pairs whose answers are the same tokens, `N` int64."""
        with np.load(self.folder / f"{split}-pairs.npz") as stored:
            return stored["ids"][stored["equal"]]


def packed_digest(config: RunConfig, tok: Tokenizer) -> dict[str, Any]:
    """All that the packed rows depend on, which is not the mesh; its hash names the folder."""
    whole = not config.dpo or config.data.packing == "best_fit"
    require(whole, "data.packing", config.data.packing, "best_fit, which cuts no pair in two")
    data, dpo, size = config.data, config.dpo, config.train.batch_size
    if dpo and dpo.labeled:  # a prompt is scored with two answers
        rule = f"at least twice dpo.max_length={dpo.max_length} under dpo.loss=kto"
        require(data.seq_len >= 2 * dpo.max_length, "data.seq_len", data.seq_len, rule)
        require(size > 1, "train.batch_size", size, "at least 2 under dpo.loss=kto")
    stage = ("kto" if dpo.labeled else "dpo") if dpo else "sft"
    shaped: dict[str, Any] = {"format": FORMAT, "stage": stage, "splits": list(data.splits)}
    shaped |= {"tokenizer": tok.digest, "chat": dataclasses.asdict(config.chat)}
    shaped |= {"seq_len": data.seq_len, "packing": data.packing}
    shaped |= documents.identity(documents.members(data), config.seed)
    if dpo or data.packing == "concat":
        shaped["seed"] = config.seed
    if dpo:
        shaped |= {"max_length": dpo.max_length, "max_prompt_length": dpo.max_prompt_length}
        shaped |= {"batch_size": size, "epochs": config.train.epochs}
    return shaped


def packed_folder(config: RunConfig, tok: Tokenizer) -> epath.Path:
    """The folder of this run's packed set: in `data_dir`, which may be a gs:// URL."""
    shaped = json.dumps(packed_digest(config, tok), sort_keys=True)
    digest = hashlib.sha256(shaped.encode()).hexdigest()[:16]
    stage = "dpo" if config.dpo else "sft"
    return epath.Path(config.data.data_dir) / "packed" / f"{stage}-{digest}"


def open_packed(config: RunConfig, tok: Tokenizer) -> PackedSet | None:
    """This run's packed set, verified, copied here from a URL; None where it was not built."""
    folder, home = packed_folder(config, tok), ""
    if not (folder / "manifest.json").is_file():
        return None
    if storage.is_remote(folder):
        folder, home = epath.Path(_local_copy(folder)), str(folder)
    storage.verify(folder, remedy=_remedy(folder))
    return PackedSet(Path(folder), read_manifest(folder), home)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a packed set; a ValueError if it is damaged."""
    fields = ("splits", "made_from", "seq_len", "pairs_per_row")
    if (epath.Path(folder) / storage.MANIFEST).is_file():
        storage.verify(folder, ["manifest.json"], remedy=_remedy(folder))
    return storage.read_json(epath.Path(folder) / "manifest.json", _remedy(folder), fields)


def _remedy(folder: str | os.PathLike[str]) -> str:
    return f"remove {folder}, which the next run packs again"


def build_packed(config: RunConfig, tok: Tokenizer) -> PackedSet:
    """Tokenizes and packs the run's sets; the folder appears only when it is complete."""
    place = packed_folder(config, tok)
    if storage.is_remote(place):
        raise ValueError(
            f"no packed set in {place}, and packing needs a local data_dir; pack there with "
            f"--pack_only and copy the folder packed/{place.name} to {place.parent}"
        )
    folder = Path(place)
    with storage.new_folder(folder) as temporary:
        if temporary is not None:
            manifest = _pack(config, tok, temporary)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            storage.seal(temporary)
    packed = PackedSet(folder, read_manifest(folder))
    logging.info("packed set %s: %s", folder, packed.manifest["splits"])
    return packed


def _pack(config: RunConfig, tok: Tokenizer, folder: Path) -> dict[str, Any]:
    """Fills the folder with the row files; returns the manifest."""
    data, dpo = config.data, config.dpo
    rendering = Rendering(config.chat, False, None if data.packing == "concat" else data.seq_len)
    if dpo:
        lengths = dpo.max_length, dpo.max_prompt_length
        rendering = Rendering(config.chat, True, *lengths, labeled=dpo.labeled)
    sets, tokenized, usable = documents.members(data), {}, {}
    for split, name in zip(("train", "eval"), filter(None, data.splits), strict=False):
        records, times, training = [], [], split == "train"
        for member in sets:
            count = len(prepare.read_split(str(member.folder), name))
            taken = member.times_taken(count, config.seed) if training else np.ones(count, np.int64)
            records.append((str(member.folder), name, np.flatnonzero(taken)))
            times.append(taken[taken > 0])
        tokenized[split] = documents.tokenize(folder / "work" / split, tok, rendering, records)
        usable[split] = usable_documents(
            *(rendering, data.seq_len, tokenized[split].table, np.concatenate(times)),
            training=training,
        )
        if not len(usable[split].indices):
            counts = usable[split].counts
            raise ValueError(f"split {name} of {data.dataset} has no usable document: {counts}")
    fields, plans = plan_rows(config, usable)
    splits = {}
    for split, plan in plans.items():
        longest = dpo.max_length if dpo else 0
        counts = _write_rows(folder, split, tokenized[split], plan, fields, longest)
        splits[split] = counts | {"documents": len(usable[split].indices)} | usable[split].counts
    shutil.rmtree(folder / "work")
    return fields | {"splits": splits, "made_from": packed_digest(config, tok)}


def _write_rows(
    folder: Path, split: str, tokenized: Documents, plan: SplitPlan, fields: dict, max_length: int
) -> dict[str, Any]:
    """Writes the rows of a split, and of pairs ids, sources and ties; the manifest's fields."""
    seq_len, pairs = fields["seq_len"], fields["pairs_per_row"]
    tokens = targets = 0
    ids, used = np.zeros((len(plan.rows), pairs), np.int64), {}
    writer = ArrayRecordWriter(str(folder / f"{split}.array_record"), "group_size:1,zstd:1")
    for number, indices in enumerate(tqdm(plan.rows, desc="write rows", unit="row")):
        selected = [tokenized.read(i) for i in indices]
        if plan.others:
            selected = [
                documents.with_other_answer(document, tokenized.read(i), max_length)
                for document, i in zip(selected, plan.others[number], strict=True)
            ]
        if plan.skips:
            row = packing.stream_row(selected, plan.skips[number], seq_len)
        else:
            row = packing.build_row(selected, seq_len, pairs)
            ids[number] = row["pair_ids"]
            used |= {document.id: i for document, i in zip(selected, indices, strict=True)}
        writer.write(row.tobytes())
        tokens += int((row["segments"] > 0).sum())
        targets += int(row["loss_mask"].sum())
    writer.close()
    if pairs:
        at = [*used.values()]
        sources, equal = tokenized.sources[at], tokenized.table["equal"][at]
        stored: dict[str, Any] = {"rows": ids, "ids": np.array([*used])}
        np.savez(folder / f"{split}-pairs.npz", sources=sources, equal=equal, **stored)
    padding = round(1 - tokens / (len(plan.rows) * seq_len), 4)
    counts = {"tokens": tokens, "target_tokens": targets, "padding_share": padding}
    return {"rows": len(plan.rows)} | counts


def _local_copy(source: epath.Path) -> Path:
    """The copy of a packed set in the user's cache; a ValueError names a file that came damaged."""
    local = storage.user_cache() / "packed" / source.name
    with storage.new_folder(local) as temporary:
        if temporary is not None:
            logging.info("copying %s to %s", source, local)
            for path in tqdm(storage.files_below(source), f"copy {source.name}"):
                with path.open("rb") as theirs, (temporary / path.name).open("wb") as ours:
                    shutil.copyfileobj(theirs, ours, 1 << 24)
            storage.verify(temporary, remedy=f"copy the packed set to {source} again")
    return local
