"""The TFDS side: features, serialized records, shards. Importing it imports TFDS, no TensorFlow."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled
from etils import epath
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.proto import tf_example_pb2

from zephyr_jax import storage
from zephyr_jax.data.prepare import convert
from zephyr_jax.data.prepare.convert import INDEX, OPEN, Converted
from zephyr_jax.data.prepare.prepare import DATASETS, REPORT, VERSION, Plan
from zephyr_jax.data.raw.filters import load_contaminants, signature
from zephyr_jax.data.raw.readers import Chunk, chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash

SHARD_BYTES = 128 << 20  # of records; a shard is about half of that on disk
_WORTH_PROCESSES = 32 << 20  # bytes of raw rows from which starting processes pays
_TEXT = tfds.features.Text()
_NAME = {"prompt": _TEXT, "prompt_id": _TEXT}
_TURN = {"role": _TEXT, "content": _TEXT}
_MESSAGES = tfds.features.Sequence(_TURN)
_BOOL = tfds.features.Scalar(np.bool_)
_SCORES = dict.fromkeys(("score_chosen", "score_rejected"), tfds.features.Scalar(np.float32))
_COLUMNS: dict[str, dict[str, Any]] = {
    # Whether a turn is learned from, and as JSON what chat templates read of a tool's turn.
    "dialogue": {"messages": tfds.features.Sequence(_TURN | {"train": _BOOL, "tool": _TEXT})},
    "pair": {"chosen": _MESSAGES, "rejected": _MESSAGES, **_SCORES, "source": _TEXT},
    "unpaired": {"messages": _MESSAGES, "label": _BOOL, "source": _TEXT},
}
FEATURES: dict[str, Any] = {
    kind: tfds.features.FeaturesDict(_NAME | columns) for kind, columns in _COLUMNS.items()
}


def serialize(record: Row) -> bytes:
    """The record as a tf.train.Example, as TFDS's own encoder makes it in five times the time."""
    if "messages" in record and "label" not in record:
        record = stored(record)
    example = tf_example_pb2.Example()  # type: ignore  # a name that is made at import
    features = example.features.feature
    for name, value in record.items():
        if isinstance(value, list):
            for key in value[0]:
                _extend(features[f"{name}/{key}"], [turn[key] for turn in value])
        else:
            _extend(features[name], [value])
    return example.SerializeToString(deterministic=True)


def _extend(feature: Any, values: Sequence[Any]) -> None:
    if isinstance(values[0], bool):
        feature.int64_list.value.extend(map(int, values))
    elif isinstance(values[0], str):
        feature.bytes_list.value.extend(text.encode() for text in values)
    else:
        feature.float_list.value.extend(values)


def stored(dialogue: Row) -> Row:
    """A dialogue as it is stored, and read by `prepare.read_split`: what tools have is JSON."""
    turns = []
    for turn in dialogue["messages"]:
        tool = {key: value for key, value in turn.items() if key not in ("train", *_TURN)}
        stored_turn = {key: turn[key] for key in _TURN} | {"train": turn.get("train", True)}
        stored_turn["tool"] = json.dumps(tool, ensure_ascii=False) if tool else ""
        turns.append(stored_turn)
    return {**dialogue, "messages": turns}


class Task(NamedTuple):
    """One chunk of one source, and the file that its serialized records become."""

    plan: Plan
    source: int
    chunk: Chunk
    number: int
    records: Path


def convert_chunk(task: Task) -> Converted:
    """Writes the records of a chunk; returns their index, counts and examples."""
    result, plan = Converted(), task.plan
    contaminants = load_contaminants(plan.selection.decontaminate)
    _, name, _, split = plan.sources.files[task.source]
    home = OPEN if split is None else plan.schema.splits.index(split)
    with task.records.open("wb") as file:
        for result.lines, row in enumerate(read_rows(task.chunk, plan.max_row_mb), start=1):
            if row is None:
                continue
            result.read[name] += 1
            outcome = convert.convert_row(plan, contaminants, row)
            result.bad.update([outcome.unfit] if outcome.unfit else [])
            for rule in [outcome.unfit] if outcome.unfit else outcome.rules:
                examples = result.examples.setdefault(rule, [])
                if len(examples) < convert.EXAMPLES:
                    before, after = convert.example_of(plan.schema, row, outcome, rule)
                    examples.append({"where": result.lines, "before": before, "after": after})
            result.rules += outcome.rules
            result.dropped += not outcome.records and not outcome.unfit
            for record in outcome.records:
                hashes = [
                    keyed_hash(purpose, plan.selection.seed, record["prompt_id"])
                    for purpose in ("prompt", "holdout", "sample")
                ]
                place = task.source, result.lines, task.number, file.tell()
                size = file.write(serialize(record))
                result.index.append((*place, size, *hashes, home, OPEN, -1))
                if plan.selection.duplicates == "near":
                    result.signatures.append(signature(record["prompt"]))
    result.index = np.array(result.index, INDEX)
    return result


def merge(tasks: Sequence[Task], parts: Sequence[Converted]) -> Converted:
    """The results of all chunks as one, their lines counted from the beginning of each file."""
    total, lines = Converted(), Counter[str]()
    for task, part in zip(tasks, parts, strict=True):
        name = task.plan.sources.files[task.source].name
        for rule, examples in part.examples.items():
            for example in examples:
                example["where"] = f"{name}:{lines[name] + example['where']}"
            total.examples[rule] = (total.examples.get(rule, []) + examples)[: convert.EXAMPLES]
        part.index["line"] += lines[name]
        total.index.append(part.index)
        total.signatures += part.signatures
        total.rules += part.rules
        total.bad += part.bad
        total.read += part.read
        total.dropped += part.dropped
        lines[name] += part.lines
    total.index = np.concatenate([np.empty(0, INDEX), *total.index])
    return total


def write_set(plan: Plan, folder: Path, workers: int = 0) -> None:
    """Writes a set into a folder: convert in parallel, select, write in order."""
    # Held-out files come first, so that of two duplicates the training row is dropped.
    held_out = plan.schema.splits[1]
    files = sorted(enumerate(plan.sources.files), key=lambda file: file[1].split != held_out)
    chunks = [(at, chunk) for at, file in files for chunk in chunks_of(file.path)]
    work = folder / ".work"
    work.mkdir(parents=True)
    tasks = [Task(plan, *chunk, n, work / f"{n:05d}") for n, chunk in enumerate(chunks)]
    found = {source.path: source.path.stat() for source in plan.sources.files}
    if not workers and sum(stat.st_size for stat in found.values()) > _WORTH_PROCESSES:
        workers = convert.available_cores()
    plain = (".json", ".jsonl")
    needed = sum(x.st_size * (4 if path.suffix in plain else 12) for path, x in found.items())
    free = shutil.disk_usage(folder).free
    try:
        parts = convert.run_tasks(convert_chunk, tasks, workers, f"prepare {plan.dataset}")
        if changed := [x for x in found if x.stat().st_mtime_ns != found[x].st_mtime_ns]:
            raise ValueError(f"{changed[0]} was written to while it was read; prepare again")
        _write_selected(plan, folder, tasks, merge(tasks, parts))
    except (OSError, RuntimeError) as error:
        # Writers say in several ways that the disk or a quota is full.
        if not any(words in str(error) for words in ("No space left", "quota exceeded")):
            raise
        numbers = f"about {needed:,} bytes are needed, {free:,} were free at the start"
        raise OSError(f"no space is left for {folder}: {numbers}") from error
    shutil.rmtree(work)


def _write_selected(plan: Plan, folder: Path, tasks: Sequence[Task], result: Converted) -> None:
    features = FEATURES[DATASETS[plan.dataset].records]

    def prompt_of(record: int) -> str:
        example = next(_records(result.index[record : record + 1], tasks))
        return features.deserialize_example_np(example)["prompt"].decode()

    bad = convert.check_rows(plan, result)
    convert.select(plan, result)
    report = convert.make_report(plan, result, bad, prompt_of)
    written = []
    for fate, split in enumerate(plan.schema.splits):
        index = result.index[result.index["fate"] == fate]
        if len(index):
            written.append(_write_split(plan, split, index, tasks, folder))
    report["records_sha256"] = {info.name: digest for info, digest in written}
    storage.write_atomic(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    about = Path(__file__).parent / "sets" / plan.dataset
    citations = about / "CITATIONS.bib"
    identity = DatasetIdentity(
        name=plan.dataset,
        version=tfds.core.Version(VERSION),
        data_dir=str(folder),
        module_name=__name__,
        config_name=plan.config_name,
        release_notes={VERSION: "Turns say whether they are learned from."},
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description=(about / "README.md").read_text("utf-8"),
        citation=citations.read_text("utf-8") if citations.is_file() else None,
        split_dict=tfds.core.SplitDict([split for split, _ in written]),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.write_to_directory(folder)


def _write_split(
    plan: Plan, split: str, index: np.ndarray, tasks: Sequence[Task], folder: Path
) -> tuple[tfds.core.SplitInfo, str]:
    """Writes the shards of a split, which end where the records alone decide."""
    template = tfds.core.ShardedFileTemplate(
        epath.Path(folder), dataset_name=plan.dataset, split=split, filetype_suffix="array_record"
    )
    sizes = index["size"].astype(np.int64)
    shard_of = (np.cumsum(sizes) - sizes) // SHARD_BYTES
    shards = [index[shard_of == number] for number in np.unique(shard_of)]
    digest = hashlib.sha256()
    for number, shard in enumerate(shards):
        path = template.sharded_filepath(shard_index=number, num_shards=len(shards))
        # One record in each group, as TFDS writes, so that any can be read by itself; the fast
        # level of zstd halves the time and costs 4% of the size.
        writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        for record in _records(shard, tasks):
            digest.update(len(record).to_bytes(8, "little") + record)
            writer.write(record)
        writer.close()
    lengths, n_bytes = [len(shard) for shard in shards], int(sizes.sum())
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=n_bytes, filename_template=template
    )
    return info, digest.hexdigest()


def _records(index: np.ndarray, tasks: Sequence[Task]) -> Iterator[bytes]:
    """The serialized records of an index, which is in the order of the chunks."""
    for chunk in np.unique(index["chunk"]):
        with tasks[chunk].records.open("rb") as file:
            for offset, size in index[["offset", "size"]][index["chunk"] == chunk].tolist():
                file.seek(offset)
                yield file.read(size)
