"""The schema of a data set's rows, prompt ids and seeded random choices. Pure functions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]
Excerpt = tuple[list[str], list[str] | None]  # texts before, texts after


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one configuration of a data set reads, and how a row becomes records.

    Attributes:
        shapes: the kinds of rows, each by the keys that such a row must have.
        splits: the names of the training and the held-out split.
        problem: the reason why the values of a row do not fit, as `reason:place`, or None.
        convert: the records of a row, none if a rule dropped it, and the rules that changed or
            dropped something.
        excerpt: of a rule, a row and its records, the texts that the rule objected to or changed,
            and the texts after it.
        rules: what decides the outcome, as JSON holds it.
        forbidden: keys of rows that belong to another schema.
    """

    shapes: tuple[tuple[str, ...], ...]
    splits: tuple[str, str]
    problem: Callable[[Row], str | None]
    convert: Callable[[Row], tuple[list[Row], Counter[str]]]
    excerpt: Callable[[str, Row, list[Row]], Excerpt]
    rules: Mapping[str, Any]
    forbidden: tuple[str, ...] = ()

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
    """An integer below 2^64 that depends on the purpose, the seed and the key alone."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def selected(purpose: str, seed: int, key: str, fraction: float) -> bool:
    """Whether a key is in the fraction of all keys that a seed selects.

    >>> [selected("holdout", 0, key, 1 / 3) for key in "abcdef"].count(True)
    2
    """
    return keyed_hash(purpose, seed, key) < fraction * 2.0**64


def window(text: str, at: int = 0, width: int = 80) -> str:
    """At most `width` characters of the text around an index, with marks where it was cut.

    >>> window("abcdefghij", at=5, width=4)
    '…defg…'
    """
    start = max(0, at - width // 2)
    end = start + width
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
