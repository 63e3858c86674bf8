"""What a row is: the schema of a source, prompt ids, seeded choices, roles. Pure functions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Excerpt = tuple[list[str], list[str] | None]  # texts before, texts after


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one configuration of a data set reads, and what it makes of a row.

    `shapes` are the kinds of row that it reads, each by the keys that such a row must have; a row
    with a `forbidden` key is of another schema. `splits` are the names of the training and the
    held-out split. `problem` names what is wrong with the types of a row, or is None. `convert`
    gives the records to write, none if a rule dropped the row, and the rules that had a say.
    `excerpt` shows what a rule did: texts before, texts after. `rules` is what shaped the result,
    as JSON holds it.
    """

    shapes: tuple[tuple[str, ...], ...]
    forbidden: tuple[str, ...]
    splits: tuple[str, str]
    problem: Callable[[Row], str | None]
    convert: Callable[[Row], tuple[list[Row], Counter[str]]]
    excerpt: Callable[[str, Row, list[Row]], tuple[list[str], list[str] | None]]
    rules: Mapping[str, Any]

    def fits(self, row: object) -> bool:
        """Whether a parsed record has the keys of one of the shapes."""
        return (
            isinstance(row, dict)
            and any(all(key in row for key in shape) for shape in self.shapes)
            and not any(key in row for key in self.forbidden)
        )

    def unfit(self, row: Row) -> str | None:
        """The reason why a row does not fit: a key that it lacks, or a wrong type; or None."""
        lacking = ([key for key in shape if key not in row] for shape in self.shapes)
        fewest = min(lacking, key=len)
        return f"missing_key:{fewest[0]}" if fewest else self.problem(row)

    @property
    def wanted(self) -> str:
        """The shapes in words, for messages."""
        return " or ".join(", ".join(shape) for shape in self.shapes)


def prompt_digest(prompt: str) -> str:
    """The prompt's id, as the published sets have it: SHA-256 of its UTF-8 bytes, in hex.

    >>> prompt_digest("Which books are still banned in Canada?")[:8]
    'aeccf551'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()


def keyed_hash(purpose: str, seed: int, key: str) -> int:
    """An integer below 2^64 that the purpose, the seed and the key alone decide."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def selected(purpose: str, seed: int, key: str, fraction: float) -> bool:
    """Whether a key is in the share of all keys that a seed picks, whatever its neighbors.

    >>> [selected("holdout", 0, key, 1 / 3) for key in "abcdef"].count(True)
    2
    """
    return keyed_hash(purpose, seed, key) < fraction * 2.0**64


def well_ordered(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether user and assistant alternate up to an answer, behind at most one system turn.

    >>> well_ordered([{"role": role} for role in ("system", "user", "assistant")])
    True
    >>> well_ordered([{"role": "user"}]), well_ordered([])
    (False, False)
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2)


def not_messages(value: object) -> bool:
    """Whether a value is anything but a list of {role: str, content: str}."""
    return not isinstance(value, list) or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )


def window(text: str, at: int = 0, width: int = 80) -> str:
    """At most `width` characters of the text around an index, with marks where it was cut.

    >>> window("abcdefghij", at=5, width=4)
    '…defg…'
    """
    start = max(0, at - width // 2)
    end = start + width
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
