"""The prompts of a round: from a prepared set, files or the hub, drawn, and kept off benchmarks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.filters import contamination, load_contaminants
from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, Schema, first_columns, prompt_digest
from zephyr_jax.data.raw.sources import find_sources
from zephyr_jax.data.raw.turns import as_turns, wrong_type
from zephyr_jax.feedback.config import PromptsConfig

# The columns that hold the prompt: of several that a row has, the first.
_COLUMNS = {
    "instruction": "text",
    "prompt": "text or turns",
    "question": "text",
    "messages": "turns",
    "conversations": "turns",
}


class Prompt(NamedTuple):
    """One question, by whose id everything about it is found again."""

    id: str  # SHA-256 of its text
    text: str
    source: str  # the column `source` of its row, or the name of the set


def read_prompts(config: PromptsConfig, seed: int) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts in the order in which they were read, and counts of what was left out.

    Left out are rows without a text (`empty`), rows of other shapes (`unreadable`), repeated
    prompts (`duplicate`), those that meet a benchmark (`contaminated`) and what was not drawn.

    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if no prompt is left.
    """
    contaminants = load_contaminants(config.decontaminate)
    counts, prompts = Counter[str](), dict[str, Prompt]()
    for text, source in _texts(config):
        counts["read"] += 1
        key = prompt_digest(text or "")
        if text is None:
            counts["unreadable"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif key in prompts:
            counts["duplicate"] += 1
        elif contamination({"messages": [{"role": "user", "content": text}]}, contaminants):
            counts["contaminated"] += 1
        else:
            prompts[key] = Prompt(key, text, source)
    drawn = list(prompts.values())
    if config.count and config.count < len(drawn):
        counts["not_drawn"] = len(drawn) - config.count
        kept = sorted(random.Random(seed).sample(range(len(drawn)), config.count))
        drawn = [drawn[i] for i in kept]
    if not drawn:
        raise ValueError(f"prompts.source={config.source} has no prompt to answer: {dict(counts)}")
    return drawn, {**counts, "prompts": len(drawn)}


def _texts(config: PromptsConfig) -> Iterator[tuple[str | None, str]]:
    """Each row's first question, None if it has none, and where the row says it is from."""
    base = Path(config.data_dir).expanduser() / config.source
    versions = sorted(path.parent for path in base.glob("*/dataset_info.json"))
    if versions:
        split = config.split or prepare.report(versions[-1])["rows"]["kept"][0]
        for record in prepare.read_split(versions[-1], split):
            yield record["prompt"], record.get("source") or config.source
        return
    schema = Schema(
        shapes=tuple((name,) for name in _COLUMNS),
        splits=("train", "test"),
        problem=lambda _: None,
        convert=lambda _: ([], Counter()),
        texts=lambda _row, _rule: [],
        rules={},
    )
    for file in find_sources(config.source, schema).files:
        for chunk in chunks_of(file.path):
            for row in filter(None, read_rows(chunk)):
                source = row.get("source") if isinstance(row, dict) else None
                yield first_question(row), str(source or Path(config.source).name)


def first_question(row: Row | str) -> str | None:
    """The text of a row's first question, None where it has none in the known columns."""
    if not isinstance(row, dict):
        return None
    (column,) = first_columns(row, [(name,) for name in _COLUMNS])
    if wrong_type(row, {column: _COLUMNS[column]}):
        return None
    turns = as_turns(row[column])
    return next((turn["content"] for turn in turns if turn["role"] == "user"), None)
