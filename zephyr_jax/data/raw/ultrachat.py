"""UltraChat rows, raw or published as ultrachat_200k -> {prompt, prompt_id, messages}."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

from zephyr_jax.data.raw.cleaning import CleaningRules, clean_dialogue
from zephyr_jax.data.raw.schema import Row, Schema, not_messages, prompt_digest, well_ordered
from zephyr_jax.data.raw.turns import cleaning_excerpt

NAME = "ultrachat"
SPLITS = ("train_sft", "test_sft")


def schemas(rules: CleaningRules | None = None) -> dict[str, Schema]:
    """The schema of each configuration: `raw`, cleaned by the rules, and `200k`, checked only."""
    rules = rules or CleaningRules()
    return {
        "raw": Schema(
            shapes=(("id", "data"),),
            forbidden=(),
            splits=SPLITS,
            problem=_raw_problem,
            convert=partial(convert_raw, rules=rules),
            excerpt=partial(_excerpt, rules=rules),
            rules=dataclasses.asdict(rules),
        ),
        "200k": Schema(
            shapes=(("prompt", "prompt_id", "messages"),),
            # The preference sets of the same makers have these three columns too.
            forbidden=("chosen",),
            splits=SPLITS,
            problem=_published_problem,
            convert=convert_published,
            excerpt=partial(_excerpt, rules=rules),
            rules={},
        ),
    }


def convert_raw(row: Row, rules: CleaningRules) -> tuple[list[Row], Counter[str]]:
    """The cleaned dialogue in the columns of ultrachat_200k, or none, and the rules that applied.

    >>> [made], counts = convert_raw({"id": "0", "data": ["hi there", "Hello."]}, CleaningRules())
    >>> made["prompt"], made["messages"][1], counts
    ('Hi there', {'role': 'assistant', 'content': 'Hello.'}, Counter({'truecase': 1}))
    """
    turns, counts = clean_dialogue(row["data"], rules)
    if turns is None:
        return [], counts
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    ]
    record = {"prompt": turns[0], "prompt_id": prompt_digest(turns[0]), "messages": messages}
    return [record], counts


def convert_published(row: Row) -> tuple[list[Row], Counter[str]]:
    """The row of ultrachat_200k as it is, or none, and what was found.

    Dropped: `bad_roles` (not user and assistant in turn up to an answer), `empty_turn`. Kept and
    counted: `prompt_id_not_sha256`, since the published id, and not its making, names the prompt.
    """
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if not well_ordered(messages):
        return [], Counter(bad_roles=1)
    if not all(turn["content"].strip() for turn in messages if turn["role"] != "system"):
        return [], Counter(empty_turn=1)
    odd_id = row["prompt_id"] != prompt_digest(row["prompt"])
    record = {"prompt": row["prompt"], "prompt_id": row["prompt_id"], "messages": messages}
    return [record], Counter(prompt_id_not_sha256=1) if odd_id else Counter()


def _raw_problem(row: Row) -> str | None:
    turns = row["data"]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        return "wrong_type:data"
    return None if isinstance(row["id"], str | int) else "wrong_type:id"


def _published_problem(row: Row) -> str | None:
    for key in ("prompt", "prompt_id"):
        if not isinstance(row[key], str):
            return f"wrong_type:{key}"
    return "wrong_type:messages" if not_messages(row["messages"]) else None


def _excerpt(
    rule: str, before: Row, after: list[Row], rules: CleaningRules
) -> tuple[list[str], list[str] | None]:
    """What a rule did to the turns of a row."""
    old = before["data"] if "data" in before else [turn["content"] for turn in before["messages"]]
    new = [turn["content"] for turn in after[0]["messages"]] if after else None
    return cleaning_excerpt(rule, old, new, rules)
