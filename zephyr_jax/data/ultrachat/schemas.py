"""UltraChat rows, raw or published as ultrachat_200k -> {prompt, prompt_id, messages}."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

from zephyr_jax.data.cleaning import CleaningRules, clean_dialogue, refusal
from zephyr_jax.data.rows import Row, Schema, not_messages, prompt_digest, well_ordered, window

NAME = "ultrachat"
SPLITS = ("train_sft", "test_sft")


def schemas(rules: CleaningRules | None = None) -> dict[str, Schema]:
    """The schema of each configuration: `raw`, cleaned by the rules, and `200k`, checked only."""
    rules = rules or CleaningRules()
    return {
        "raw": Schema(
            keys=("id", "data"),
            forbidden=(),
            splits=SPLITS,
            problem=_raw_problem,
            convert=partial(convert_raw, rules=rules),
            excerpt=partial(_excerpt, rules=rules),
            rules=dataclasses.asdict(rules),
        ),
        "200k": Schema(
            keys=("prompt", "prompt_id", "messages"),
            # The preference sets of the same makers have these three columns too.
            forbidden=("chosen",),
            splits=SPLITS,
            problem=_published_problem,
            convert=convert_published,
            excerpt=partial(_excerpt, rules=rules),
            rules={},
        ),
    }


def convert_raw(row: Row, rules: CleaningRules) -> tuple[Row | None, Counter[str]]:
    """The cleaned dialogue in the columns of ultrachat_200k, or None, and the rules that applied.

    >>> made, counts = convert_raw({"id": "0", "data": ["hi there", "Hello."]}, CleaningRules())
    >>> made["prompt"], made["messages"][1], counts
    ('Hi there', {'role': 'assistant', 'content': 'Hello.'}, Counter({'truecase': 1}))
    """
    turns, counts = clean_dialogue(row["data"], rules)
    if turns is None:
        return None, counts
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    ]
    record = {"prompt": turns[0], "prompt_id": prompt_digest(turns[0]), "messages": messages}
    return record, counts


def convert_published(row: Row) -> tuple[Row | None, Counter[str]]:
    """The row of ultrachat_200k as it is, or None, and what was found.

    Dropped: `bad_roles` (not user and assistant in turn up to an answer), `empty_turn`. Kept and
    counted: `prompt_id_not_sha256`, since the published id, and not its making, names the prompt.
    """
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    if not well_ordered(messages):
        return None, Counter(bad_roles=1)
    if not all(turn["content"].strip() for turn in messages if turn["role"] != "system"):
        return None, Counter(empty_turn=1)
    odd_id = row["prompt_id"] != prompt_digest(row["prompt"])
    record = {"prompt": row["prompt"], "prompt_id": row["prompt_id"], "messages": messages}
    return record, Counter(prompt_id_not_sha256=1) if odd_id else Counter()


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
    rule: str, before: Row, after: Row | None, rules: CleaningRules
) -> tuple[list[str], list[str] | None]:
    """The place that a rule changed or objected to, else the beginning of each turn."""
    old = before["data"] if "data" in before else [turn["content"] for turn in before["messages"]]
    new = [turn["content"] for turn in after["messages"]] if after else None
    if rule == "truecase" and new:
        old_turn, new_turn = next(pair for pair in zip(old, new, strict=True) if len(set(pair)) > 1)
        at = next(i for i in range(len(old_turn)) if old_turn[i] != new_turn[i])
        return [window(old_turn, at)], [window(new_turn, at)]
    if rule == "refusal":
        turn = next(turn for turn in old[1::2] if refusal(turn, rules.refusal_phrases))
        phrase = refusal(turn, rules.refusal_phrases) or ""
        return [f"{phrase}: {window(turn, max(0, turn.lower().find(phrase.lower())))}"], None
    return [window(turn) for turn in old[:4]], [window(turn) for turn in new[:4]] if new else None
