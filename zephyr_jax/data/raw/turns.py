"""The turns of a dialogue as people's files spell them, and checks of a row's values.

A turn is {"role", "content"} or, as in ShareGPT files, {"from", "value"}. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zephyr_jax.data.raw.schema import Row, window

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
_SPELLINGS = (("role", "content"), ("from", "value"))
_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def first_columns(row: Mapping[str, Any], groups: Sequence[Iterable[str]]) -> Any:
    """The first group of columns that a row has, at best without the Nones of parquet."""
    filled = [group for group in groups if all(row.get(key) is not None for key in group)]
    present = [group for group in groups if all(key in row for key in group)]
    return [*filled, *present, *groups][0]


def wrong_type(row: Row, columns: Mapping[str, str]) -> str | None:
    """The first column whose value has another type, as `reason:place`, or None.

    The types of columns are "text", "texts", "number", "id", "turns" and "text or turns", where a
    single turn stands for a list of one. With "?" the value may be None or missing, and so may
    the content of a turn, since APIs write turns that only call a tool so.

    >>> wrong_type({"prompt": "Why?", "output": 3}, {"prompt": "text", "output": "text?"})
    'wrong_type:output'
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "user", "content": ["Hi"]}]
    >>> wrong_type({"messages": turns}, {"messages": "turns"})
    'wrong_type:messages[1].content'
    >>> wrong_type({"messages": [{"speaker": "user", "text": "Hi"}]}, {"messages": "turns"})
    'unknown_keys:messages[0]{speaker,text}'
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
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (kind == "id" and isinstance(value, int))


def _turns_problem(key: str, turns: object) -> str | None:
    if not isinstance(turns, list):
        return f"wrong_type:{key}"
    for i, turn in enumerate(turns):
        place = f"{key}[{i}]"
        if not isinstance(turn, dict):
            return f"wrong_type:{place}"
        role, content = first_columns(turn, _SPELLINGS)
        if role not in turn:
            return f"unknown_keys:{place}{{{window(','.join(sorted(map(str, turn))), width=60)}}}"
        if content not in turn:
            return f"missing_key:{place}.{content}"
        problem = wrong_type(turn, {role: "text", content: "text?"})
        if problem:
            return problem.replace(":", f":{place}.")
    return None


def as_turns(value: str | Mapping | Sequence[Mapping], role: str = "user") -> list[Turn]:
    """Turns as {role, content}, with the standard names of known roles; a text is one turn.

    >>> as_turns([{"from": "human", "value": "Hi"}, {"from": "tool", "value": None}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'tool', 'content': ''}]
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = []
    for turn in [value] if isinstance(value, Mapping) else value:
        key, content = first_columns(turn, _SPELLINGS)
        name = turn[key] or ""
        turns.append(
            {"role": ROLES.get(name.strip().lower(), name), "content": turn[content] or ""}
        )
    return turns


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
    """Whether user and assistant alternate up to an answer, after at most one system turn.

    >>> well_ordered([{"role": role} for role in ("system", "user", "assistant")])
    True
    >>> well_ordered([{"role": "user"}]), well_ordered([])
    (False, False)
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return bool(turns) and turns == ["user", "assistant"] * (len(turns) // 2)


def unknown_roles(turns: Sequence[Turn]) -> list[str]:
    """Excerpts of the turns whose role is none of system, user and assistant."""
    return [shown(turn) for turn in turns if turn["role"] not in ROLES.values()]


def shown(turn: Mapping[str, str]) -> str:
    """The role of a turn and the beginning of its content."""
    return f"{turn['role']}: {window(turn['content'])}"


def is_transcript(text: object) -> bool:
    r"""Whether a value is a dialogue in one text, as in Anthropic's hh-rlhf.

    >>> is_transcript("\n\nHuman: Hi\n\nAssistant: Hello"), is_transcript("To err is human.")
    (True, False)
    """
    first = _MARK.match(text) if isinstance(text, str) else None
    return first is not None and first[1] == "Human" and "\n\nAssistant:" in str(text)


def transcript_turns(text: str) -> list[Turn]:
    r"""The turns of a transcript, without the blanks around each.

    >>> transcript_turns("\n\nHuman: Hi\n\nAssistant: Hello\n\n")[1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    _, *parts = _MARK.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
