r"""Dialogues in the shapes that people have them -> {prompt, prompt_id, messages}.

Messages; a question at the end that nobody answers is cut off:

>>> rules = CleaningRules(truecase=False, drop_refusals=False)
>>> turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
>>> [record], counts = convert({"messages": [*turns, turns[0]]}, rules)
>>> record["prompt"], record["messages"] == turns, counts
('Why?', True, Counter({'trailing_user_turn': 1}))

ShareGPT; an answer at the beginning that nobody asked for is cut off:

>>> spoken = [("gpt", "Hello!"), ("human", "Why?"), ("gpt", "So.")]
>>> row = {"conversations": [{"from": who, "value": text} for who, text in spoken]}
>>> [record], counts = convert(row, rules)
>>> record["messages"] == turns, counts
(True, Counter({'leading_answer': 1}))

Alpaca:

>>> row = {"instruction": "Translate.", "input": "Oui", "output": "Yes", "system": "Be brief."}
>>> [record], _ = convert({**row, "history": [["Hi", "Hello"]]}, rules)
>>> [turn["content"] for turn in record["messages"]]
['Be brief.', 'Hi', 'Hello', 'Translate.\n\nOui', 'Yes']

A question and its answer, as texts or as lists of turns:

>>> [record], _ = convert({"prompt": "Why?", "completion": "So."}, rules)
>>> record["messages"] == turns
True
>>> convert({"prompt": "Why?", "response": [turns[1]]}, rules)[0] == [record]
True
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

from zephyr_jax.data.raw.cleaning import CleaningRules, clean_dialogue
from zephyr_jax.data.raw.schema import Row, Schema, prompt_digest, well_ordered
from zephyr_jax.data.raw.turns import (
    Turn,
    as_turns,
    cleaning_excerpt,
    shown,
    turns_problem,
    unknown_roles,
)

NAME = "messages"
SPLITS = ("train_sft", "test_sft")
SHAPES = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
_LISTS = ("messages", "conversations")


def schemas(rules: CleaningRules | None = None) -> dict[str, Schema]:
    """The schema of the one configuration `own`; without rules nothing is cleaned.

    >>> schemas()["own"].fits({"instruction": "Why?", "output": "Because."})
    True
    """
    rules = rules or CleaningRules(truecase=False, drop_refusals=False)
    return {
        "own": Schema(
            shapes=SHAPES,
            # Sets of pairs carry prompts and messages too.
            forbidden=("chosen", "rejected"),
            splits=SPLITS,
            problem=problem,
            convert=partial(convert, rules=rules),
            excerpt=partial(_excerpt, rules=rules),
            rules=dataclasses.asdict(rules),
        )
    }


def convert(row: Row, rules: CleaningRules) -> tuple[list[Row], Counter[str]]:
    """The dialogue in the columns of ultrachat_200k, none if a rule dropped it, and the rules.

    A `system` column becomes the first turn where there is none. The row's own `prompt_id` stays;
    without one it is the digest of the first question.

    Counted and kept: `trailing_user_turn` (a question at the end that nobody answers is cut off),
    `leading_answer` (so is an answer at the beginning of `conversations` that nobody asked for),
    and `truecase`. Dropped: `unknown_role` (a tool's, for one), `label_false` (an answer that is
    marked as bad), `empty_dialogue`, `bad_roles` (not user and assistant in turn), `empty_turn`,
    `refusal`. A dropped row counts under the rule that dropped it and no other.
    """
    turns = _turns(row)
    if unknown_roles(turns):
        return [], Counter(unknown_role=1)
    if row.get("label") is False:
        return [], Counter(label_false=1)
    system, body, counts = _trimmed(turns, _shape(row))
    if not body:
        return [], Counter(empty_dialogue=1)
    if body[0]["role"] == "system" or not well_ordered(body):  # a second one
        return [], Counter(bad_roles=1)
    cleaned, cleaning = clean_dialogue([turn["content"] for turn in body], rules)
    if cleaned is None:
        return [], cleaning
    messages = system + [
        {"role": turn["role"], "content": text} for turn, text in zip(body, cleaned, strict=True)
    ]
    record = {
        "prompt": cleaned[0],
        "prompt_id": row.get("prompt_id") or prompt_digest(cleaned[0]),
        "messages": messages,
    }
    return [record], counts + cleaning


def _shape(row: Row) -> tuple[str, ...] | None:
    """The first shape that a row has; a key of None, as parquet fills holes, is none."""
    there = (shape for shape in SHAPES if all(row.get(key) is not None for key in shape))
    return next(there, None)


def _turns(row: Row) -> list[Turn]:
    """All turns of a row, their roles in our names."""
    shape = _shape(row)
    assert shape is not None, "problem() lets only rows of a shape pass"
    if shape[0] in _LISTS:
        turns = as_turns(row[shape[0]])
    elif shape[0] == "instruction":
        asked = [text for text in (row["instruction"], row.get("input")) if text and text.strip()]
        exchanges = [*(row.get("history") or []), ("\n\n".join(asked), row["output"])]
        turns = [turn for asked, said in exchanges for turn in _exchange(asked, said)]
    else:
        asked, said = (row[key] for key in shape)
        turns = _exchange(asked, said)
    system = row.get("system")
    if system and system.strip() and [turn["role"] for turn in turns[:1]] != ["system"]:
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _exchange(asked: str | list[Any], said: str | list[Any]) -> list[Turn]:
    """A question and its answer, each a text or a list of turns."""
    return [
        turn
        for role, value in (("user", asked), ("assistant", said))
        for turn in (
            [{"role": role, "content": value}] if isinstance(value, str) else as_turns(value)
        )
    ]


def _trimmed(
    turns: list[Turn], shape: tuple[str, ...] | None
) -> tuple[list[Turn], list[Turn], Counter[str]]:
    """The system turn, the turns from a question to an answer, and what was cut off."""
    counts: Counter[str] = Counter()
    start = 1 if turns and turns[0]["role"] == "system" else 0
    system, body = turns[:start], turns[start:]
    if shape == ("conversations",) and body and body[0]["role"] == "assistant":
        body = body[1:]
        counts["leading_answer"] += 1
    if body and body[-1]["role"] == "user":
        body = body[:-1]
        counts["trailing_user_turn"] += 1
    return system, body, counts


def problem(row: Row) -> str | None:
    """What is wrong with the types of a row, as `reason:place`, or None.

    >>> problem({"prompt": "Why?", "completion": 3})
    'wrong_type:completion'
    >>> problem({"conversations": [{"from": "human", "text": "Why?"}]})
    'missing_key:conversations[0].value'
    >>> problem({"instruction": "Why?", "output": "So.", "history": [["Hi"]]})
    'wrong_type:history[0]'
    """
    shape = _shape(row)
    if shape is None:
        present = next((keys for keys in SHAPES if all(key in row for key in keys)), SHAPES[0])
        return f"wrong_type:{next(key for key in present if row.get(key) is None)}"
    for key in ("prompt_id", "system", "input"):
        if not isinstance(row.get(key), str | None):
            return f"wrong_type:{key}"
    for key in shape:
        as_text = isinstance(row[key], str) and key not in _LISTS
        as_list = isinstance(row[key], list) and shape[0] != "instruction"
        found = (
            None if as_text else turns_problem(key, row[key]) if as_list else f"wrong_type:{key}"
        )
        if found:
            return found
    return _history_problem(row.get("history")) if shape[0] == "instruction" else None


def _history_problem(history: object) -> str | None:
    if not isinstance(history, list | None):
        return "wrong_type:history"
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            return f"wrong_type:history[{i}]"
    return None


def _excerpt(
    rule: str, before: Row, after: list[Row], rules: CleaningRules
) -> tuple[list[str], list[str] | None]:
    """The turn that a rule objected to or cut off, else the beginnings of the first turns."""
    turns = _turns(before)
    messages = after[0]["messages"] if after else None
    if rule in ("truecase", "refusal"):
        _, body, _ = _trimmed(turns, _shape(before))
        new = messages and [turn["content"] for turn in messages if turn["role"] != "system"]
        return cleaning_excerpt(rule, [turn["content"] for turn in body], new, rules)
    if rule == "unknown_role":
        return unknown_roles(turns)[:4], None
    part = slice(-2, None) if rule == "trailing_user_turn" else slice(4)
    return [*map(shown, turns[part])], [*map(shown, messages[part])] if messages else None
