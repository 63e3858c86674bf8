"""The packed set on disk: rows in ArrayRecord files beside a manifest of all that shaped them.

`build_packed` tokenises and packs a prepared TFDS set; `open_packed` finds the set that belongs to
a run or says that it is missing. A set whose digests differ is another set, in another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled
from tqdm import tqdm

from zephyr_jax.config import RunConfig
from zephyr_jax.data import packing, prepare
from zephyr_jax.data.chat import render_chat, render_pair
from zephyr_jax.data.tokenizer import Tokenizer

FORMAT = 1  # of the packed files; a change of layout or of rendering raises it
_ROWS_PER_FILE = 16384


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """A packed set that is whole on disk.

    `manifest["splits"]` has rows, documents, tokens, target_tokens, padding_share and counts of
    what was cut or dropped; preference sets also have rows_per_batch (R), pairs_per_row (K).
    """

    folder: Path
    manifest: dict[str, Any]

    def rows(self, split: str) -> RowSource:
        """The rows of "train" or "eval"."""
        info = self.manifest["splits"][split]
        files = [str(self.folder / name) for name in info["files"]]
        dtype = packing.row_dtype(self.manifest["seq_len"], self.manifest["pairs_per_row"])
        return RowSource(files, info["rows"], dtype)


class RowSource:
    """Random access to the rows of one split; it pickles, and opens its files when first read."""

    def __init__(self, files: list[str], n_rows: int, dtype: np.dtype):
        self._files, self._n_rows, self._dtype = files, n_rows, dtype
        self._source: ArrayRecordDataSource | None = None

    def __len__(self) -> int:
        return self._n_rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at these indices, as a structured array; an index of -1 gives an empty row.

        Raises:
            ValueError: if a file does not hold what the manifest says.
        """
        if self._source is None:
            self._source = ArrayRecordDataSource(self._files)
            if len(self._source) != self._n_rows:
                raise ValueError(
                    f"{Path(self._files[0]).parent} holds {len(self._source)} rows where its "
                    f"manifest says {self._n_rows}; delete the folder and pack again"
                )
        out = np.zeros(len(indices), self._dtype)
        real = [(at, int(i)) for at, i in enumerate(indices) if i >= 0]
        records = self._source.__getitems__([i for _, i in real]) if real else []
        for (at, _), record in zip(real, records, strict=True):
            out[at] = np.frombuffer(record, self._dtype)[0]
        return out


def packed_digest(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> dict[str, Any]:
    """Everything that the packed rows depend on; its hash names the set's folder."""
    shaped: dict[str, Any] = {
        "format": FORMAT,
        "stage": "dpo" if config.dpo else "sft",
        "dataset": prepare.dataset_digest(_dataset_folder(config)),
        "splits": [config.data.train_split, config.data.eval_split],
        "tokenizer": tok.digest,
        "chat": dataclasses.asdict(config.chat),
        "seq_len": config.data.seq_len,
    }
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


def _dataset_folder(config: RunConfig) -> Path:
    base = Path(config.data.data_dir) / config.data.dataset
    versions = sorted(p.parent for p in base.glob("*/dataset_info.json"))
    if not versions:
        name, _, variant = config.data.dataset.partition("/")
        raise FileNotFoundError(
            f"no prepared set in {base}; make it with: python scripts/prepare_data.py {name} "
            f"--source=FOLDER --data_dir={config.data.data_dir} --config_name={variant or 'raw'}"
        )
    return versions[-1]


def packed_folder(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> Path:
    """Where this run's packed set is, or will be."""
    shaped = json.dumps(packed_digest(config, tok, rows_multiple), sort_keys=True)
    digest = hashlib.sha256(shaped.encode()).hexdigest()[:16]
    stage = "dpo" if config.dpo else "sft"
    return Path(config.data.data_dir) / "packed" / f"{stage}-{digest}"


def open_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet | None:
    """This run's packed set, or None where it has not been built."""
    folder = packed_folder(config, tok, rows_multiple)
    if not (folder / "manifest.json").is_file():
        return None
    return PackedSet(folder, json.loads((folder / "manifest.json").read_text()))


def build_packed(config: RunConfig, tok: Tokenizer, rows_multiple: int) -> PackedSet:
    """Tokenises and packs the run's set; the folder appears only when it is whole.

    Args:
        config: the run.
        tok: its tokenizer.
        rows_multiple: what the rows of a batch must be divisible by (mesh shards times
            micro-batches).
    """
    folder = packed_folder(config, tok, rows_multiple)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    source = _dataset_folder(config)
    make = _pairs if config.dpo else _dialogues
    documents, counts = {}, {}
    for split, name in (("train", config.data.train_split), ("eval", config.data.eval_split)):
        documents[split], counts[split] = make(config, tok, prepare.read_split(source, name), name)
        if not documents[split]:
            raise ValueError(f"split {name} of {source} has no usable document: {counts[split]}")
    if config.dpo:
        manifest, rows = _pack_pairs(config, documents, rows_multiple)
    else:
        manifest, rows = _pack_dialogues(config, documents)
    splits = {}
    for split, packed in rows.items():
        info = _write_rows(temporary, split, packed, documents[split], manifest)
        splits[split] = info | dict(counts[split])
    manifest |= {"made_from": packed_digest(config, tok, rows_multiple), "splits": splits}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    temporary.rename(folder)
    _log_manifest(folder, manifest)
    return PackedSet(folder, manifest)


def _dialogues(config: RunConfig, tok: Tokenizer, records: Iterable[dict], name: str):
    chat, seq_len = config.chat, config.data.seq_len
    documents, counts = [], Counter(read=0, truncated=0, tokens_cut=0, dropped_no_target=0)
    for record in tqdm(records, desc=f"tokenise {name}", unit="dialogue"):
        ids, mask = render_chat(
            tok,
            record["messages"],
            bos=chat.bos,
            legacy_specials=chat.legacy_specials,
            append_eos=chat.append_eos,
            empty_system=chat.empty_system,
        )
        targets = mask if chat.loss_on == "assistant" else [1] * len(ids)
        document = packing.dialogue_document(ids, targets, seq_len)
        counts["read"] += 1
        counts["truncated"] += len(ids) > seq_len
        counts["tokens_cut"] += max(len(ids) - seq_len, 0)
        if len(document.tokens):
            documents.append(document)
        else:
            counts["dropped_no_target"] += 1
    return documents, counts


def pair_id(prompt: list[dict], chosen: str, rejected: str) -> int:
    """A positive 63-bit hash of a pair's prompt messages and both answers."""
    said = json.dumps([[(m["role"], m["content"]) for m in prompt], chosen, rejected])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1 or 1


def _pairs(config: RunConfig, tok: Tokenizer, records: Iterable[dict], name: str):
    chat, dpo = config.chat, config.dpo
    assert dpo is not None
    documents, ids = [], set()
    counts = Counter(read=0, prompts_cut=0, answers_cut=0, dropped_too_long=0, dropped_duplicate=0)
    for record in tqdm(records, desc=f"tokenise {name}", unit="pair"):
        counts["read"] += 1
        messages = record["chosen"][:-1]
        answers = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
        key = pair_id(messages, *answers)
        if key in ids:
            counts["dropped_duplicate"] += 1
            continue
        ids.add(key)
        whole = render_pair(
            tok,
            messages,
            *answers,
            bos=chat.bos,
            legacy_specials=chat.legacy_specials,
            append_eos=chat.append_eos,
            empty_system=chat.empty_system,
        )
        with_bos = whole.prompt[:1] == [tok.bos_id]
        cut = packing.cut_pair(*whole, dpo.max_length, dpo.max_prompt_length, with_bos)
        counts["prompts_cut"] += len(cut[0]) < len(whole.prompt)
        counts["answers_cut"] += len(cut[1]) < len(whole.chosen) or len(cut[2]) < len(
            whole.rejected
        )
        document = packing.pair_document(*cut, key)
        if len(document.tokens) > config.data.seq_len:
            counts["dropped_too_long"] += 1
        else:
            documents.append(document)
    return documents, counts


def _pack_dialogues(config: RunConfig, documents: dict[str, list[packing.Document]]):
    rows = {
        split: packing.best_fit([len(d.tokens) for d in docs], config.data.seq_len)
        for split, docs in documents.items()
    }
    return {"seq_len": config.data.seq_len, "pairs_per_row": 0}, rows


def _pack_pairs(config: RunConfig, documents: dict[str, list[packing.Document]], multiple: int):
    """Every epoch's batches of R rows one after another; the held-out pairs in rows as they fit."""
    seq_len = config.data.seq_len
    lengths = {split: [len(d.tokens) for d in docs] for split, docs in documents.items()}
    plan = packing.plan_pairs(
        lengths["train"], config.train.batch_size, seq_len, config.seed, config.train.epochs
    )
    batches = [batch for epoch in plan for batch in epoch]
    needed = max(map(len, batches))
    n_rows = packing.round_up(needed, multiple)
    train = [row for batch in batches for row in batch + [[]] * (n_rows - len(batch))]
    held_out = packing.best_fit(lengths["eval"], seq_len)
    fill = sum(lengths["train"]) * len(plan) / (len(batches) * n_rows * seq_len)
    if fill < 0.7:
        logging.warning(
            "rows are only %.0f%% full: batches of %d pairs need %d rows of %d tokens and data x "
            "fsdp x micro_batches = %d rounds that to %d; give further chips to tensor",
            *(100 * fill, config.train.batch_size, needed, seq_len, multiple, n_rows),
        )
    manifest = {
        "seq_len": seq_len,
        "pairs_per_row": max(map(len, train + held_out)),
        "rows_per_batch": n_rows,
        "batch_size": config.train.batch_size,
        "steps_per_epoch": len(plan[0]),
        "epochs": len(plan),
    }
    return manifest, {"train": train, "eval": held_out}


def _write_rows(
    folder: Path, split: str, rows: list[list[int]], documents: list[packing.Document], manifest
) -> dict[str, Any]:
    seq_len, pairs = manifest["seq_len"], manifest["pairs_per_row"]
    files, digest, tokens, targets = [], hashlib.sha256(), 0, 0
    for start in tqdm(range(0, len(rows), _ROWS_PER_FILE), desc=f"write {split}", unit="file"):
        files.append(f"{split}-{start // _ROWS_PER_FILE:05d}.array_record")
        writer = ArrayRecordWriter(str(folder / files[-1]), "group_size:1")
        for row in rows[start : start + _ROWS_PER_FILE]:
            built = packing.build_row([documents[i] for i in row], seq_len, pairs)
            writer.write(built.tobytes())
            digest.update(built.tobytes())
            tokens += int((built["segments"] > 0).sum())
            targets += int(built["loss_mask"].sum())
        writer.close()
    return {
        "files": files,
        "rows": len(rows),
        "documents": len(documents),
        "tokens": tokens,
        "target_tokens": targets,
        "padding_share": round(1 - tokens / (len(rows) * seq_len), 4),
        "sha256": digest.hexdigest(),
    }


def _log_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    for split, info in manifest["splits"].items():
        counts = ", ".join(f"{k} {v}" for k, v in info.items() if k not in ("files", "sha256"))
        logging.info("packed %s: %s", split, counts)
    logging.info("packed set: %s", folder)
