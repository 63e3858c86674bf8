"""Dialogues in every shape -> {prompt, prompt_id, messages}, with a label {..., label, source}."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from zephyr_jax.data.raw import schema
from zephyr_jax.data.raw.binarize import BinarizationRules, source_counts
from zephyr_jax.data.raw.cleaning import CleaningRules, clean_dialogue, refusal
from zephyr_jax.data.raw.schema import BadRow, Reader, Records, Row, Schema, Turn

SPLITS = ("train_sft", "test_sft")
UNPAIRED_SPLITS = ("train_prefs", "test_prefs")
# The keys of a shape and the types of their values; of several shapes that a row has the first.
RAW = {"id": "id", "data": "texts"}  # stingning/ultrachat: user and assistant alternate
PUBLISHED = {"prompt": "text", "prompt_id": "text", "messages": "turns"}  # ultrachat_200k
OWN = (
    {"messages": "turns"},  # OpenAI, TRL
    {"conversations": "turns"},  # ShareGPT
    {"instruction": "text", "output": "text"},  # Alpaca
    {"prompt": "text or turns", "completion": "text or turns"},
    {"prompt": "text or turns", "response": "text or turns"},
)
SHAPES = (*OWN, RAW)


def ultrachat_schemas(rules: CleaningRules | None = None) -> dict[str, Schema]:
    """UltraChat's schemas: `raw`, cleaned by the rules, and `200k`, checked only."""
    rules = rules or CleaningRules()
    raw = _schema([RAW], partial(convert_raw, rules=rules), rules)
    return {"raw": raw, "200k": _schema([PUBLISHED], convert_published)}


def own_schemas(rules: CleaningRules | None = None) -> dict[str, Schema]:
    """The schema `own` of the user's dialogues; without rules nothing is cleaned."""
    rules = rules or CleaningRules(truecase=False, drop_refusals=False)
    return {"own": _schema(OWN, partial(convert, rules=rules), rules)}


def unpaired_schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema `own` of labeled answers; of the rules `drop_sources` applies."""
    rules = rules or BinarizationRules()
    own = _schema(OWN, partial(convert_labeled, rules=rules))
    shapes = tuple((*shape, label) for label in schema.LABELS for shape in OWN)
    identity = {"drop_sources": list(rules.drop_sources)}
    return {"own": dataclasses.replace(own, shapes=shapes, splits=UNPAIRED_SPLITS, rules=identity)}


def _schema(
    columns: Sequence[dict[str, str]], convert: Any, rules: CleaningRules | None = None
) -> Schema:
    return Schema(
        shapes=tuple(map(tuple, columns)),
        splits=SPLITS,
        convert=convert,
        texts=partial(_texts, phrases=rules.refusal_phrases if rules else ()),
        rules=dataclasses.asdict(rules) if rules else {},
        forbidden=("chosen", "rejected"),  # sets of pairs carry prompts and messages too
    )


def convert_raw(row: Row, rules: CleaningRules) -> Records:
    """The cleaned dialogue of a raw UltraChat row, or none, and the rules that applied."""
    return _cleaned(row, [], _read(row)[0], rules)


def convert_published(row: Row) -> Records:
    """The row of ultrachat_200k as it is, or none, and the rules that applied."""
    schema.check_types(row, PUBLISHED)
    turns, counts = _checked(row)
    if not turns:
        return [], counts
    if row["prompt_id"] != schema.prompt_digest(row["prompt"]):
        counts["prompt_id_not_sha256"] += 1  # and kept: the published id names the prompt
    return [{"prompt": row["prompt"], "prompt_id": row["prompt_id"], "messages": turns}], counts


def convert(row: Row, rules: CleaningRules) -> Records:
    """The user's dialogue, none if a rule dropped it, and the rules that applied."""
    turns, found = _read(row)
    counts = Counter(found.keys())
    if rules.keep_tool_turns and counts.pop("tool_turn", 0):
        counts["tool_turn_kept"] += 1
    if any(map(schema.is_dropping, counts)):
        return [], counts
    if schema.truth(_label(row)) is False:
        return [], Counter(label_false=1)
    start = 1 if turns and turns[0]["role"] == "system" else 0
    system, body = turns[:start], turns[start:]
    is_sharegpt = "conversations" in schema.first_columns(row, SHAPES)
    if is_sharegpt and body and body[0]["role"] == "assistant":
        body = body[1:]
        counts["leading_answer"] += 1
    if body and body[-1]["role"] == "user":
        body = body[:-1]
        counts["trailing_user_turn"] += 1
    if not body:
        return [], Counter(empty_dialogue=1)
    if not schema.well_ordered(system + body):
        return [], Counter(bad_roles=1)
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in body):
        return [], Counter(no_target_turn=1)
    records, cleaning = _cleaned(row, system, body, rules)
    return records, counts + cleaning if records else cleaning


def convert_labeled(row: Row, rules: BinarizationRules) -> Records:
    """The labeled answer of a row, none if a rule dropped it, and the rules that applied."""
    label = schema.truth(_label(row))
    if label is None:
        raise BadRow(f"not_true_or_false:label={schema.window(str(_label(row)), width=20)}")
    turns, remarked = _checked(row, labeled=True)
    counts = source_counts(row, rules)
    if counts["source_dropped"]:
        return [], counts
    if not turns:
        return [], counts + remarked
    turns = schema.plain(turns)
    prompt, prompt_id = schema.named_prompt(turns[:-1])
    record = {"prompt": prompt, "prompt_id": row.get("prompt_id") or prompt_id, "messages": turns}
    record |= {"label": label, "source": row.get("source") or ""}
    return [record], counts + remarked + Counter(["desirable" if label else "undesirable"])


def _checked(row: Row, labeled: bool = False) -> tuple[list[Turn], Counter[str]]:
    """The turns of a row that is a dialogue up to an answer, else none, and the remarks."""
    turns, found = _read(row, labeled)
    counts = Counter(found.keys())
    if any(map(schema.is_dropping, counts)):
        return [], counts
    if not schema.well_ordered(turns):
        return [], Counter(bad_roles=1)
    if not all(turn["content"].strip() for turn in turns if turn["role"] != "system"):
        return [], Counter(empty_turn=1)
    return turns, counts


def _cleaned(row: Row, system: list[Turn], body: list[Turn], rules: CleaningRules) -> Records:
    turns, counts = clean_dialogue(body, rules)
    if turns is None:
        return [], counts
    prompt = turns[0]["content"]
    prompt_id = row.get("prompt_id") or schema.prompt_digest(prompt)
    return [{"prompt": prompt, "prompt_id": prompt_id, "messages": system + turns}], counts


def _read(row: Row, labeled: bool = False) -> tuple[list[Turn], dict[str, str]]:
    """All turns of a row of any shape, those before a completion as context, and the remarks."""
    columns, reader = schema.first_columns(row, SHAPES), Reader(row, answers=labeled)
    types = {"history": "exchanges?"} if "instruction" in columns else {}
    schema.check_types(row, schema.OPTIONAL | columns | types)
    keys, learned = list(columns), "last" if labeled else "all"
    if "data" in keys:
        turns = _alternating(row["data"])
    elif len(keys) == 1:
        turns = reader.with_system(reader.turns(keys[0], learned=learned))
    elif keys[0] == "prompt":
        context = reader.with_system(reader.turns("prompt", "user", "none"))
        answers = reader.turns(keys[1], "assistant", learned)
        turns = [*({**turn, "train": False} for turn in context), *answers]
    else:
        question = schema.joined(row["instruction"], row.get("input"))
        earlier = [text for exchange in row.get("history") or [] for text in exchange]
        turns = reader.with_system(_alternating([*earlier, question, row["output"]]))
    return turns, reader.remarks


def _alternating(texts: Sequence[str]) -> list[Turn]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def _label(row: Row) -> object:
    return next((row[key] for key in schema.LABELS if row.get(key) is not None), None)


def _texts(row: Row, rule: str, phrases: tuple[str, ...] = ()) -> list[str]:
    """The turns of a row, or what a rule objected to: a refusal, or what the remarks name."""
    turns, found = _read(row)
    if rule == "refusal":
        answers = [turn["content"] for turn in turns[1:] if turn["role"] == "assistant"]
        phrase, text = next((p, t) for t in answers if (p := refusal(t, phrases)))
        return [f"{phrase}: {schema.window(text, max(0, text.lower().find(phrase.lower())))}"]
    if rule in found:
        return [found[rule]]
    return [f"{turn['role']}: {turn['content']}" for turn in turns]
