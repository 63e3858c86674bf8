"""The packed set on disk: rows in ArrayRecord files beside a manifest of all that shaped them.

`build_packed` tokenizes and packs prepared TFDS sets; `open_packed` finds the set that belongs to
a run or says that it is missing. A set whose digests differ is another set, in another folder.
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
from zephyr_jax.data.packing import documents as tokenized
from zephyr_jax.data.packing import mixture, packing, remote, row_files
from zephyr_jax.data.packing import plan as packing_plan
from zephyr_jax.data.packing.locks import making
from zephyr_jax.data.packing.row_files import RowSource
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.prepare.parallel import available_cores, run_tasks
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.storage import is_remote

FORMAT = 3  # of the packed files; a change of layout or of rendering raises it
RECORDS_PER_PORTION = 2048  # a process more is worth its start for about as many


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A packed set that is whole on disk.

    `manifest["splits"]` has rows, documents, tokens, target_tokens, padding_share and counts of
    what was cut or dropped; preference sets also have rows_per_batch (R), pairs_per_row (K).
    `home` is where a local copy was taken from, if it is one.
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
        pairs = self.manifest["pairs_per_row"]
        if not pairs:
            return np.zeros((self.manifest["splits"][split]["rows"], 0), np.int64)
        return np.load(self.folder / _ids_file(split))

    def sources(self, split: str) -> dict[int, str]:
        """Pair id -> where the pair came from, "" where its record does not say."""
        with np.load(self.folder / _sources_file(split)) as stored:
            ids, names = stored["pair_ids"].tolist(), stored["sources"].tolist()
        return dict(zip(ids, names, strict=True))


def packed_digest(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> dict[str, Any]:
    """Everything that the packed rows depend on; its hash names the set's folder.

    Raises:
        FileNotFoundError: if a set of the mixture has not been prepared.
        ValueError: if the mixture is none, or preferences are to be packed as a stream.
    """
    if config.dpo and config.data.packing != "best_fit":
        raise ValueError(
            f"data.packing={config.data.packing} would cut preference pairs in two; use best_fit"
        )
    shaped: dict[str, Any] = {
        "format": FORMAT,
        "stage": "dpo" if config.dpo else "sft",
        "splits": [config.data.train_split, config.data.eval_split],
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
            "share_prompt": config.dpo.share_prompt,
            "seed": config.seed,
        }
    return shaped


def packed_folder(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> epath.Path:
    """Where this run's packed set is, or will be: in `data_dir`, which may be a gs:// URL."""
    shaped = json.dumps(packed_digest(config, tok, rows_multiple), sort_keys=True)
    digest = hashlib.sha256(shaped.encode()).hexdigest()[:16]
    stage = "dpo" if config.dpo else "sft"
    return epath.Path(config.data.data_dir) / "packed" / f"{stage}-{digest}"


def open_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet | None:
    """This run's packed set, or None where it has not been built.

    Of a set behind a URL such as gs://bucket/data a copy on this machine is opened, made by the
    first process that asks for it (`zephyr_jax.data.packing.remote`, which says what was tested).
    """
    folder = packed_folder(config, tok, rows_multiple)
    if not is_remote(folder):
        return _opened(Path(folder))
    local = remote.local_copy(folder)
    return local and _opened(local, str(folder))


def _opened(folder: Path, home: str = "") -> PackedSet | None:
    if not (folder / "manifest.json").is_file():
        return None
    return PackedSet(folder, json.loads((folder / "manifest.json").read_text()), home)


def build_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet:
    """Tokenizes and packs the run's sets; the folder appears only when it is whole.

    The rows are the same whatever the number of processes (`data.workers`). A run that is killed
    leaves its work in a folder `*.tmp`, where the next one goes on; a second process that wants
    the same set waits for the first.

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
            f"--pack_for and copy the folder packed/{place.name} to {place.parent}"
        )
    folder = Path(place)
    with making(folder) as temporary:
        if temporary is not None and not (temporary / "manifest.json").is_file():
            shaped = packed_digest(config, tok, rows_multiple)
            manifest = _pack(config, tok, rows_multiple, temporary) | {"made_from": shaped}
            (temporary / "manifest.part").write_text(json.dumps(manifest, indent=1))
            (temporary / "manifest.part").rename(temporary / "manifest.json")
        if temporary is not None:
            shutil.rmtree(temporary / "work", ignore_errors=True)
    packed = _opened(folder)
    if packed is None:
        raise ValueError(f"{folder} holds no manifest.json; delete the folder and pack again")
    _log_manifest(folder, packed.manifest)
    return packed


def _pack(config: RunConfig, tok: Tokenizer, multiple: int, folder: Path) -> dict[str, Any]:
    """Fills the folder with the row files; the manifest but for what it was made from."""
    (folder / "work").mkdir(exist_ok=True)
    portions, times = _tokenize(config, tok, folder / "work")
    dtype = tokenized.code_dtype(tok.vocab_size)
    made = {split: tokenized.Tokenized(parts, dtype) for split, parts in portions.items()}
    tables = {split: documents.table for split, documents in made.items()}
    choose = packing_plan.usable_pairs if config.dpo else packing_plan.usable_dialogues
    rendering = _rendering(config)
    usable = {split: choose(rendering, table, times[split]) for split, table in tables.items()}
    for split, part in usable.items():
        if not len(part.indices):
            name = config.data.train_split if split == "train" else config.data.eval_split
            raise ValueError(
                f"split {name} of {config.data.dataset} has no usable document: {part.counts}"
            )
    if config.dpo:
        manifest, plans = packing_plan.plan_preferences(config, usable, multiple)
    else:
        manifest, plans = packing_plan.plan_dialogues(config, usable)
    share_prompt = config.dpo is None or config.dpo.share_prompt
    tasks = _row_tasks(folder, plans, portions, dtype, manifest, share_prompt)
    told = run_tasks(
        row_files.write_rows,
        tasks,
        _workers(config, sum(map(len, tables.values()))),
        sizes=[len(task.rows) for task in tasks],
        title="write rows",
        unit="row",
    )
    written = {Path(task.path).name: info for task, info in zip(tasks, told, strict=True)}
    files = {name: info["file"] for name, info in written.items()}
    if config.dpo:
        for split, plan in plans.items():
            path, pairs = folder / _ids_file(split), manifest["pairs_per_row"]
            np.save(path, packing_plan.pair_id_table(plan.rows, tables[split]["id"], pairs))
            files[path.name] = remote.file_info(path)
            path, used = folder / _sources_file(split), usable[split].indices
            np.savez(path, pair_ids=tables[split]["id"][used], sources=made[split].sources[used])
            files[path.name] = remote.file_info(path)
    splits = {split: _told(split, plan, written, manifest) for split, plan in plans.items()}
    return manifest | {"splits": splits, "files": files}


def _tokenize(
    config: RunConfig, tok: Tokenizer, work: Path
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """By split, the folders of its portions and how often each document in them is taken."""
    stored = tokenized.store_tokenizer(tok, work / "tokenizer.pickle")
    rendering = _rendering(config)
    tasks: list[tokenized.Portion] = []
    folders: dict[str, list[str]] = {"train": [], "eval": []}
    times: dict[str, list[np.ndarray]] = {"train": [], "eval": []}
    for member in mixture.members(config.data):
        source = str(member.folder)
        for split, name in (("train", config.data.train_split), ("eval", config.data.eval_split)):
            taken = np.ones(len(prepare.read_split(source, name)), np.int64)
            if split == "train":
                taken = mixture.times_taken(len(taken), member, config.seed)
            records = np.flatnonzero(taken)
            times[split].append(taken[records])
            for start in range(0, len(records), RECORDS_PER_PORTION):
                out = str(work / f"{split}-{len(folders[split]):05d}")
                folders[split].append(out)
                portion = records[start : start + RECORDS_PER_PORTION]
                tasks.append(tokenized.Portion(out, source, name, portion, rendering, stored))
    sizes = [len(task.records) for task in tasks]
    unit = "pair" if config.dpo else "dialogue"
    workers = _workers(config, sum(sizes))
    run_tasks(tokenized.tokenize, tasks, workers, sizes=sizes, title="tokenize", unit=unit)
    return folders, {split: np.concatenate(parts) for split, parts in times.items()}


def _rendering(config: RunConfig) -> tokenized.Rendering:
    return tokenized.Rendering(config.chat, config.dpo, config.data.seq_len, config.data.packing)


def _workers(config: RunConfig, n_records: int) -> int:
    wanted = config.data.workers or available_cores()
    return min(wanted, 1 + n_records // RECORDS_PER_PORTION)


def _row_tasks(
    folder: Path,
    plans: dict[str, packing_plan.SplitPlan],
    portions: dict[str, list[str]],
    dtype: np.dtype,
    manifest: dict[str, Any],
    share_prompt: bool,
) -> list[row_files.RowTask]:
    tasks, size = [], row_files.ROWS_PER_FILE
    for split, plan in plans.items():
        for start in range(0, len(plan.rows), size):
            name = f"{split}-{start // size:05d}.array_record"
            task = row_files.RowTask(
                path=str(folder / name),
                done=str(folder / "work" / f"{name}.json"),
                portions=tuple(portions[split]),
                dtype=dtype.str,
                rows=plan.rows[start : start + size],
                skips=plan.skips and plan.skips[start : start + size],
                seq_len=manifest["seq_len"],
                pairs=manifest["pairs_per_row"],
                share_prompt=share_prompt,
            )
            tasks.append(task)
    return tasks


def _told(
    split: str, plan: packing_plan.SplitPlan, written: dict[str, Any], manifest: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says of a split."""
    own = {name: info for name, info in written.items() if name.startswith(f"{split}-")}
    tokens = sum(info["tokens"] for info in own.values())
    hashes = "".join(info["rows"] for info in own.values())
    return {
        "files": list(own),
        "rows": len(plan.rows),
        "documents": plan.documents,
        "tokens": tokens,
        "target_tokens": sum(info["target_tokens"] for info in own.values()),
        "padding_share": round(1 - tokens / (len(plan.rows) * manifest["seq_len"]), 4),
        "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        **plan.counts,
    }


def _ids_file(split: str) -> str:
    return f"{split}-pair_ids.npy"


def _sources_file(split: str) -> str:
    return f"{split}-sources.npz"


def _log_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    for split, info in manifest["splits"].items():
        counts = ", ".join(f"{k} {v}" for k, v in info.items() if k not in ("files", "sha256"))
        logging.info("packed %s: %s", split, counts)
    logging.info("packed set: %s", folder)
