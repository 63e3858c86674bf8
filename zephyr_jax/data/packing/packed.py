"""The packed set on disk: rows in ArrayRecord files, and a manifest of all that shaped them.

`build_packed` tokenizes and packs prepared TFDS sets; `open_packed` finds the set that belongs to
a run or returns None. A set whose digests differ is another set, in another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import mixture, packing, remote, row_files
from zephyr_jax.data.packing.documents import Documents, Records, Rendering, tokenize, worker_count
from zephyr_jax.data.packing.plan import SplitPlan, plan_rows, usable_documents
from zephyr_jax.data.packing.row_files import RowSource, RowTask
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.prepare.convert import run_tasks
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.storage import is_remote

FORMAT = 3  # of the packed files; a change of layout or of rendering raises it


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A complete packed set on disk.

    `manifest["splits"]` has rows, documents, tokens, target_tokens, padding_share and counts of
    what was cut or dropped; preference sets also have rows_per_batch (R), pairs_per_row (K).
    `home` is the URL of which this is a local copy, if it is one.
    """

    folder: Path
    manifest: dict[str, Any]
    home: str = ""

    def rows(self, split: str) -> RowSource:
        """The rows of "train" or "eval"."""
        info = self.manifest["splits"][split]
        files = [str(self.folder / name) for name in info["files"]]
        dtype = packing.row_dtype(self.manifest["seq_len"], self.manifest["pairs_per_row"])
        return RowSource(files, info["rows"], dtype)

    def pair_ids(self, split: str) -> np.ndarray:
        """The pair ids of all rows, `rows K` int64, 0 for none: what every process must know."""
        if not self.manifest["pairs_per_row"]:
            return np.zeros((self.manifest["splits"][split]["rows"], 0), np.int64)
        return np.load(self.folder / f"{split}-pair_ids.npy")

    def sources(self, split: str) -> dict[int, str]:
        """Pair id -> where the pair came from, "" where its record does not say."""
        with np.load(self.folder / f"{split}-sources.npz") as stored:
            ids, names = stored["pair_ids"].tolist(), stored["sources"].tolist()
        return dict(zip(ids, names, strict=True))


def packed_digest(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> dict[str, Any]:
    """Everything that the packed rows depend on; its hash names the set's folder.

    Raises:
        FileNotFoundError: if a set of the mixture has not been prepared.
        ValueError: if preferences are to be packed as a stream.
    """
    if config.dpo and config.data.packing != "best_fit":
        raise ValueError(
            f"data.packing={config.data.packing} would cut preference pairs in two; use best_fit"
        )
    shaped: dict[str, Any] = {
        "format": FORMAT,
        "stage": "dpo" if config.dpo else "sft",
        "splits": list(config.data.splits),
        "tokenizer": tok.digest,
        "chat": dataclasses.asdict(config.chat),
        "seq_len": config.data.seq_len,
        "packing": config.data.packing,
    }
    shaped |= mixture.identity(mixture.members(config.data), config.seed)
    if config.data.packing == "concat":
        shaped["seed"] = config.seed
    if config.dpo:
        shaped |= {
            "max_length": config.dpo.max_length,
            "max_prompt_length": config.dpo.max_prompt_length,
            "batch_size": config.train.batch_size,
            "rows_multiple": rows_multiple,
            "epochs": config.train.epochs,
            "seed": config.seed,
        }
    return shaped


def packed_folder(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> epath.Path:
    """The folder of this run's packed set: in `data_dir`, which may be a gs:// URL."""
    shaped = json.dumps(packed_digest(config, tok, rows_multiple), sort_keys=True)
    digest = hashlib.sha256(shaped.encode()).hexdigest()[:16]
    stage = "dpo" if config.dpo else "sft"
    return epath.Path(config.data.data_dir) / "packed" / f"{stage}-{digest}"


def open_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet | None:
    """This run's packed set, or None where it has not been built.

    A set behind a URL such as gs://bucket/data is copied to this machine by the first process that
    opens it (`zephyr_jax.data.packing.remote`, which says what was tested).
    """
    folder = packed_folder(config, tok, rows_multiple)
    if not is_remote(folder):
        return _open(Path(folder))
    local = remote.local_copy(folder)
    return local and _open(local, str(folder))


def _open(folder: Path, home: str = "") -> PackedSet | None:
    if not (folder / "manifest.json").is_file():
        return None
    return PackedSet(folder, json.loads((folder / "manifest.json").read_text()), home)


def build_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet:
    """Tokenizes and packs the run's sets; the folder appears only when it is complete.

    The rows are the same whatever the number of processes. A second process that
    needs the same set waits for the first.

    Args:
        config: the run.
        tok: its tokenizer.
        rows_multiple: what the rows of a batch must be divisible by (mesh shards times
            micro-batches).

    Raises:
        FileNotFoundError: if a set has not been prepared.
        ValueError: if the configuration is wrong, a split is empty or `data_dir` is not local.
    """
    place = packed_folder(config, tok, rows_multiple)
    if is_remote(place):
        raise ValueError(
            f"no packed set in {place}, and packing needs a local data_dir; pack there with "
            f"--pack_only --num_shards=N and copy the folder packed/{place.name} to {place.parent}"
        )
    folder = Path(place)
    with remote.new_folder(folder) as temporary:
        if temporary is not None:
            manifest = _pack(config, tok, rows_multiple, temporary)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    packed = _open(folder)
    if packed is None:
        raise ValueError(f"{folder} holds no manifest.json; delete the folder and pack again")
    for split, info in packed.manifest["splits"].items():
        counts = ", ".join(f"{k} {v}" for k, v in info.items() if k not in ("files", "sha256"))
        logging.info("packed %s: %s", split, counts)
    logging.info("packed set: %s", folder)
    return packed


def _pack(config: RunConfig, tok: Tokenizer, multiple: int, folder: Path) -> dict[str, Any]:
    """Fills the folder with the row files; returns the manifest."""
    rendering = Rendering(config.chat, config.dpo, config.data.seq_len, config.data.packing)
    sets, documents, usable = mixture.members(config.data), {}, {}
    for split, name in zip(("train", "eval"), config.data.splits, strict=True):
        records, times = [], []
        for member in sets:
            source = str(member.folder)
            taken = np.ones(len(prepare.read_split(source, name)), np.int64)
            if split == "train":
                taken = mixture.times_taken(len(taken), member, config.seed)
            records.append(Records(source, name, np.flatnonzero(taken)))
            times.append(taken[taken > 0])
        work = folder / "work" / split
        made = documents[split] = tokenize(work, tok, rendering, records)
        part = usable[split] = usable_documents(rendering, made.table, np.concatenate(times))
        if not len(part.indices):
            raise ValueError(
                f"split {name} of {config.data.dataset} has no usable document: {part.counts}"
            )
    fields, plans = plan_rows(config, usable, multiple)
    files, splits = {}, {}
    for split, plan in plans.items():
        splits[split], written = _write_rows(folder, split, documents[split], plan, fields)
        files |= written
        splits[split] |= {"documents": len(usable[split].indices)} | usable[split].counts
        if config.dpo:
            files |= _write_pairs(folder, split, documents[split], plan, fields["pairs_per_row"])
    shutil.rmtree(folder / "work")
    made_from = packed_digest(config, tok, multiple)
    return fields | {"splits": splits, "files": files, "made_from": made_from}


def _write_rows(
    folder: Path,
    split: str,
    documents: Documents,
    plan: SplitPlan,
    fields: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes the rows of a split; returns the manifest's fields of the split and of its files."""
    tasks, size = [], row_files.ROWS_PER_FILE
    for start in range(0, len(plan.rows), size):
        name = f"{split}-{start // size:05d}.array_record"
        part = SplitPlan(plan.rows[start:][:size], plan.skips[start:][:size])
        layout = fields["seq_len"], fields["pairs_per_row"]
        tasks.append(RowTask(str(folder / name), str(documents.folder), part, *layout))
    results = run_tasks(
        row_files.write_rows,
        tasks,
        worker_count(len(documents.table)),
        "write rows",
    )
    files = {
        Path(task.path).name: result["file"] for task, result in zip(tasks, results, strict=True)
    }
    tokens = sum(result["tokens"] for result in results)
    digests = "".join(result["rows"] for result in results)
    info = {
        "files": list(files),
        "rows": len(plan.rows),
        "tokens": tokens,
        "target_tokens": sum(result["target_tokens"] for result in results),
        "padding_share": round(1 - tokens / (len(plan.rows) * fields["seq_len"]), 4),
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    return info, files


def _write_pairs(
    folder: Path, split: str, documents: Documents, plan: SplitPlan, pairs_per_row: int
) -> dict[str, Any]:
    """Writes the pair ids of all rows and the pairs' sources; returns their `file_info`s."""
    ids, used = documents.table["id"], np.unique([i for row in plan.rows for i in row])
    rows = np.zeros((len(plan.rows), pairs_per_row), np.int64)
    for row, indices in zip(rows, plan.rows, strict=True):
        row[: len(indices)] = ids[indices]
    paths = folder / f"{split}-pair_ids.npy", folder / f"{split}-sources.npz"
    np.save(paths[0], rows)
    np.savez(paths[1], pair_ids=ids[used], sources=documents.sources[used])
    return {path.name: row_files.file_info(path) for path in paths}
