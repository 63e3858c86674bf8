"""The schema of a data set's rows, the turns of dialogues, prompt ids and seeded random choices.

A turn is {"role", "content"} or, as in ShareGPT files, {"from", "value"}. Pure functions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Turn = dict[str, str]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one configuration of a data set reads, and how a row becomes a record."""

    shapes: tuple[tuple[str, ...], ...]  # kinds of rows, each by the keys that it must have
    splits: tuple[str, str]  # the names of the training and the held-out split
    problem: Callable[[Row], str | None]  # why the values do not fit, as `reason:place`
    # The records of a row, none if a rule dropped it, and the rules that changed or dropped.
    convert: Callable[[Row], tuple[list[Row], Counter[str]]]
    texts: Callable[[Row, str], list[str]]  # of a row or a record, as an example of a rule
    rules: Mapping[str, Any]  # what decides the outcome, as JSON holds it
    forbidden: tuple[str, ...] = ()  # keys of rows that belong to another schema

    def fits(self, row: object) -> bool:
        """Whether a parsed record has the keys of one of the shapes."""
        if not isinstance(row, dict) or any(key in row for key in self.forbidden):
            return False
        return any(all(key in row for key in shape) for shape in self.shapes)

    def unfit(self, row: Row) -> str | None:
        """The reason why a row does not fit: a key that it lacks, or a wrong type; or None."""
        lacking = ([key for key in shape if key not in row] for shape in self.shapes)
        fewest = min(lacking, key=len)
        return f"missing_key:{fewest[0]}" if fewest else self.problem(row)


def prompt_digest(prompt: str) -> str:
    """The prompt's id, as the published sets have it: SHA-256 of its UTF-8 bytes, in hex.

    >>> prompt_digest("Which books are still banned in Canada?")[:8]
    'aeccf551'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()


def named_prompt(turns: Sequence[Turn], text: str | None = None) -> tuple[str, str]:
    """The prompt of some turns in words, unless `text` has it the first question, and its id.

    The id is the prompt's, or of several questions that of all turns as JSON.
    """
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
    """At most `width` characters of the text around an index, with marks where it was cut.

    >>> window("abcdefghij", at=5, width=4)
    '…defg…'
    """
    start = max(0, at - width // 2)
    end = start + width
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def first_columns(row: Mapping[str, Any], groups: Sequence[Iterable[str]]) -> Any:
    """The first group of columns that a row has, at best without the Nones of parquet."""
    filled = [group for group in groups if all(row.get(key) is not None for key in group)]
    present = [group for group in groups if all(key in row for key in group)]
    return [*filled, *present, *groups][0]


def wrong_type(row: Row, columns: Mapping[str, str]) -> str | None:
    """The first column whose value has another type, as `reason:place`, or None.

    Types are "text", "texts", "number", "id", "exchanges" (lists of two texts), "turns" and "text
    or turns", where a single turn stands for a list of one. With "?" the value may be None or
    missing, and so may the content of a turn: APIs write turns that call a tool so.
    """
    for key, kind in columns.items():
        value = row.get(key)
        if kind.endswith("?") and value is None:
            continue
        kind = kind.removesuffix("?")
        if kind == "text or turns" and not isinstance(value, str):
            problem = _turns_problem(key, [value] if isinstance(value, dict) else value)
        elif kind == "turns":
            problem = _turns_problem(key, value)
        else:
            problem = None if _has_type(value, kind) else f"wrong_type:{key}"
        if problem:
            return problem
    return None


def _has_type(value: object, kind: str) -> bool:
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == "exchanges":
        pairs: list[Any] = value if isinstance(value, list) else [None]
        return all(_has_type(pair, "texts") and len(pair) == 2 for pair in pairs)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (kind == "id" and isinstance(value, int))


def _turns_problem(key: str, turns: object) -> str | None:
    if not isinstance(turns, list):
        return f"wrong_type:{key}"
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return f"wrong_type:{key}[{i}]"
        role, content = _turn_keys(turn)
        if role not in turn:
            return f"unknown_keys:{key}[{i}]{{{window(','.join(sorted(turn)), width=60)}}}"
        if content not in turn:
            return f"missing_key:{key}[{i}].{content}"
        problem = wrong_type(turn, {role: "text", content: "text?"})
        if problem:
            return problem.replace(":", f":{key}[{i}].")
    return None


def _turn_keys(turn: Mapping[str, Any]) -> tuple[str, str]:
    return ("from", "value") if turn.get("from") is not None else ("role", "content")


def as_turns(value: str | Mapping | Sequence[Mapping], role: str = "user") -> list[Turn]:
    """Turns as {role, content}, with the standard names of known roles; a text is one turn."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = []
    for turn in [value] if isinstance(value, Mapping) else value:
        key, content = _turn_keys(turn)
        name = ROLES.get(turn[key].strip().lower(), turn[key])
        turns.append({"role": name, "content": turn[content] or ""})
    return turns


def truth(value: object) -> bool | None:
    """True or False for a bool, for 0 and 1 and for both as texts; None for anything else."""
    return _TRUTH.get(str(value).strip().lower())


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns behind the text of the `system` column, unless they have a system turn."""
    system = row.get("system")
    if not system or not system.strip() or [turn["role"] for turn in turns[:1]] == ["system"]:
        return turns
    return [{"role": "system", "content": system}, *turns]


def joined(*texts: str | None) -> str:
    """The texts that are not blank, with a blank line between them."""
    return "\n\n".join(text for text in texts if text and text.strip())


def well_ordered(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether user and assistant alternate up to an answer, after at most one system turn."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2)


def unknown_roles(turns: Sequence[Turn]) -> list[Turn]:
    """The turns whose role is none of system, user and assistant."""
    return [turn for turn in turns if turn["role"] not in ROLES.values()]


def is_transcript(text: object) -> bool:
    """Whether a value is a dialogue in one text, "Human: ... Assistant: ...", as in hh-rlhf."""
    first = _MARK.match(text) if isinstance(text, str) else None
    return first is not None and first[1] == "Human" and "\n\nAssistant:" in str(text)


def transcript_turns(text: str) -> list[Turn]:
    """The turns of a transcript, without the blanks around each."""
    _, *parts = _MARK.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
