"""The schema of a data set's rows, prompt ids and seeded random choices. Pure functions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Turn = dict[str, Any]


class BadRow(ValueError):
    """A row that does not fit its schema; the message is the reason, as `reason:place`."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one configuration of a data set reads, and how a row becomes a record."""

    shapes: tuple[tuple[str, ...], ...]  # kinds of rows, each by the keys that it must have
    splits: tuple[str, str]  # the names of the training and the held-out split
    # The records of a row, none if a rule dropped it, and the rules that changed or dropped; a
    # BadRow if the values do not fit.
    convert: Callable[[Row], tuple[list[Row], Counter[str]]]
    texts: Callable[[Row, str], list[str]]  # of a row or a record, as an example of a rule
    rules: Mapping[str, Any]  # what decides the outcome, as JSON holds it
    forbidden: tuple[str, ...] = ()  # keys of rows that belong to another schema

    def fits(self, row: object) -> bool:
        """Whether a parsed record has the keys of one of the shapes."""
        if not isinstance(row, dict) or any(key in row for key in self.forbidden):
            return False
        return any(all(key in row for key in shape) for shape in self.shapes)

    def read(self, row: Row) -> tuple[list[Row], Counter[str]]:
        """What `convert` returns; a BadRow also for a key that the row lacks."""
        lacking = ([key for key in shape if key not in row] for shape in self.shapes)
        if fewest := min(lacking, key=len):
            raise BadRow(f"missing_key:{fewest[0]}")
        return self.convert(row)


def prompt_digest(prompt: str) -> str:
    """The prompt's id, as the published sets have it: SHA-256 of its UTF-8 bytes, in hex.

    >>> prompt_digest("Which books are still banned in Canada?")[:8]
    'aeccf551'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()


def named_prompt(turns: Sequence[Turn], text: str | None = None) -> tuple[str, str]:
    """The prompt, `text` or the first question, and its id: of several questions by all turns."""
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    prompt = identified = text or questions[0]
    if len(questions) > 1:
        identified = json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return prompt, prompt_digest(identified)


def keyed_hash(purpose: str, seed: int, key: str) -> int:
    """An integer below 2^64 that depends on the purpose, the seed and the key alone."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def window(text: str, at: int = 0, width: int = 80) -> str:
    """At most `width` characters of the text around an index, with marks where it was cut."""
    start = max(0, at - width // 2)
    shown = text[start : start + width]
    return ("…" if start else "") + shown + ("…" if start + width < len(text) else "")


def first_columns(row: Mapping[str, Any], groups: Sequence[Iterable[str]]) -> Any:
    """The first group of columns that a row has, at best without the Nones of parquet."""
    filled = [group for group in groups if all(row.get(key) is not None for key in group)]
    present = [group for group in groups if all(key in row for key in group)]
    return [*filled, *present, *groups][0]


def joined(*texts: str | None) -> str:
    """The texts that are not blank, with a blank line between them."""
    return "\n\n".join(text for text in texts if text and text.strip())
