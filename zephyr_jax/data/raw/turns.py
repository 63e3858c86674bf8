"""The turns of a dialogue as people's files spell them, what is wrong with them, what a rule did.

A turn is {"role", "content"} or, as in ShareGPT files, {"from", "value"}. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from zephyr_jax.data.raw.cleaning import CleaningRules, refusal
from zephyr_jax.data.raw.schema import window

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


def turns_problem(key: str, value: object) -> str | None:
    """What is wrong with the types of a list of turns, as `reason:place`, or None.

    Content that is None is let pass as empty: so APIs write a turn that only calls a tool.

    >>> turns_problem("messages", [{"role": "user", "content": "Hi"}]) is None
    True
    >>> turns_problem("messages", [{"role": "user", "content": ["Hi"]}])
    'wrong_type:messages[0].content'
    >>> turns_problem("messages", [{"speaker": "user", "text": "Hi"}])
    'unknown_keys:messages[0]{speaker,text}'
    >>> turns_problem("messages", "Hi"), turns_problem("messages", [{"role": "user"}])
    ('wrong_type:messages', 'missing_key:messages[0].content')
    """
    if not isinstance(value, list):
        return f"wrong_type:{key}"
    for i, turn in enumerate(value):
        problem = _turn_problem(f"{key}[{i}]", turn)
        if problem:
            return problem
    return None


def _turn_problem(place: str, turn: object) -> str | None:
    if not isinstance(turn, dict):
        return f"wrong_type:{place}"
    role, content = _spelling(turn)
    if role not in turn:
        return f"unknown_keys:{place}{{{window(','.join(sorted(map(str, turn))), width=60)}}}"
    if not isinstance(turn[role], str):
        return f"wrong_type:{place}.{role}"
    if content not in turn:
        return f"missing_key:{place}.{content}"
    return None if isinstance(turn[content], str | None) else f"wrong_type:{place}.{content}"


def _spelling(turn: Mapping[str, object]) -> tuple[str, str]:
    """The two keys of a turn; parquet may hold both spellings, one of them None."""
    given = [keys for keys in _SPELLINGS if turn.get(keys[0]) is not None]
    there = [keys for keys in _SPELLINGS if keys[0] in turn]
    return (given or there or list(_SPELLINGS))[0]


def as_turns(value: Sequence[Mapping[str, str | None]]) -> list[Turn]:
    """The turns as {role, content}, in our names of the roles where we know them.

    >>> as_turns([{"from": "human", "value": "Hi"}, {"from": "tool", "value": None}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'tool', 'content': ''}]
    """
    turns = []
    for turn in value:
        role, content = _spelling(turn)
        said = turn[role] or ""
        turns.append(
            {"role": ROLES.get(said.strip().lower(), said), "content": turn[content] or ""}
        )
    return turns


def unknown_roles(turns: Sequence[Turn]) -> list[str]:
    """What to show of the turns whose role is none of system, user and assistant."""
    return [shown(turn) for turn in turns if turn["role"] not in ROLES.values()]


def is_transcript(text: str) -> bool:
    r"""Whether a text is a dialogue written out as in Anthropic's hh-rlhf.

    >>> is_transcript("\n\nHuman: Hi\n\nAssistant: Hello"), is_transcript("To err is human.")
    (True, False)
    """
    first = _MARK.match(text)
    return first is not None and first[1] == "Human" and "\n\nAssistant:" in text


def transcript_turns(text: str) -> list[Turn]:
    r"""The turns of a transcript, blanks around each taken off.

    >>> transcript_turns("\n\nHuman: Hi\n\nAssistant: Hello\n\n")[1]
    {'role': 'assistant', 'content': 'Hello'}
    """
    _, *parts = _MARK.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def shown(turn: Mapping[str, str]) -> str:
    """The role of a turn and the beginning of its content."""
    return f"{turn['role']}: {window(turn['content'])}"


def cleaning_excerpt(
    rule: str, old: list[str], new: list[str] | None, rules: CleaningRules
) -> tuple[list[str], list[str] | None]:
    """The place that a cleaning rule changed or objected to, else the beginning of each turn.

    Args:
        rule: its name.
        old: the contents of the turns before, the user's and the assistant's in turn.
        new: the same after cleaning, None for a dialogue that was dropped.
        rules: the rules.
    """
    if rule == "truecase" and new:
        old_turn, new_turn = next(pair for pair in zip(old, new, strict=True) if len(set(pair)) > 1)
        at = next(i for i in range(len(old_turn)) if old_turn[i] != new_turn[i])
        return [window(old_turn, at)], [window(new_turn, at)]
    if rule == "refusal":
        turn = next(turn for turn in old[1::2] if refusal(turn, rules.refusal_phrases))
        phrase = refusal(turn, rules.refusal_phrases) or ""
        return [f"{phrase}: {window(turn, max(0, turn.lower().find(phrase.lower())))}"], None
    return [window(turn) for turn in old[:4]], [window(turn) for turn in new[:4]] if new else None
