"""Pairs in every shape that is read -> {prompt, prompt_id, chosen, rejected, scores, source}."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from zephyr_jax.data.raw import binarize, schema
from zephyr_jax.data.raw.binarize import BinarizationRules, finite
from zephyr_jax.data.raw.schema import BadRow, Reader, Records, Row, Schema, Turn

SPLITS = ("train_prefs", "test_prefs")
# The columns of a pair's values: the first ones that a row has.
_ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_PROMPTS = (("prompt",), ("question",), ("instruction",))
_FORMS = ("{0}_{1}", "{1}_{0}", "{1}-{0}", "{0}-{1}")
_RATINGS = ("score", "avg_rating", "rating", "mean_rating", "overall_score", "reward", "quality")
_SCORES = tuple(
    (form.format(word, "chosen"), form.format(word, "rejected"))
    for word in _RATINGS
    for form in _FORMS
)
_ALL_SCORES = tuple(name for names in _SCORES for name in names)
RATED = ("instruction", "completions")  # openbmb/UltraFeedback
PUBLISHED = (
    # HuggingFaceH4/ultrafeedback_binarized, allenai/ultrafeedback_binarized_cleaned (with a
    # source) and trl-lib/ultrafeedback_binarized (without prompt)
    ("chosen", "rejected", "score_chosen", "score_rejected"),
    # argilla/ultrafeedback-binarized-preferences, and the same cleaned
    ("instruction", *_ANSWERS[1], "chosen_avg_rating", "rejected_avg_rating"),
    ("prompt", "chosen", "chosen-rating", "rejected", "rejected-rating"),
)
OWN = (
    ("prompt", "chosen", "rejected"),  # TRL
    ("question", "chosen", "rejected"),  # Orca
    ("conversations", "chosen", "rejected"),  # ShareGPT
    ("chosen", "rejected"),  # whole dialogues, or transcripts as in hh-rlhf
    ("instruction", "chosen_response", "rejected_response"),  # Argilla
    ("question", "chosen_response", "rejected_response"),
)


def ultrafeedback_schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """UltraFeedback's schemas: `raw`, made into pairs, and `binarized`, checked only."""
    rules = rules or BinarizationRules()
    convert_rated = partial(_rated, rules=rules)
    rated = Schema((RATED,), SPLITS, convert_rated, _texts, dataclasses.asdict(rules))
    return {"raw": rated, "binarized": _ready_pairs(PUBLISHED, rules, scored=True)}


def own_schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema `own` of the user's pairs; of the rules `ties` and `drop_sources` apply."""
    return {"own": _ready_pairs(OWN, rules or BinarizationRules(), scored=False)}


def _ready_pairs(
    shapes: tuple[tuple[str, ...], ...], rules: BinarizationRules, scored: bool
) -> Schema:
    identity = {"ties": rules.ties, "drop_sources": list(rules.drop_sources)}
    return Schema(shapes, SPLITS, partial(convert, rules=rules, scored=scored), _texts, identity)


def convert(row: Row, rules: BinarizationRules, scored: bool = False) -> Records:
    """The pair of a row, none if a rule dropped it, and the rules that applied.

    If the answers hold all turns these decide, and a prompt in words is only the name. A pair
    without scores is dropped if they have to be `scored` (`missing_scores`); else it gets 0.0.
    """
    dialogues, text, remarks = _read(row)
    counts = binarize.source_counts(row, rules) + Counter(remarks.keys())
    if counts["source_dropped"] or any(map(schema.is_dropping, counts)):
        return [], counts
    scores = [finite(row.get(name)) for name in schema.first_columns(row, _SCORES)]
    filled = [0.0 if None in scores else score for score in scores]
    pair, rule = _pair(row, dialogues, text, filled)
    if rule is None and None in scores and scored:
        rule = "missing_scores"
    elif rule is None and None in scores and any(row.get(n) is not None for n in _ALL_SCORES):
        rule = "unscored_pair"
    elif rule is None and None not in scores and scores[0] == scores[1]:
        rule = "tie" if rules.ties == "keep" else "tie_dropped"
    if rule is not None:
        counts[rule] += 1
    return ([pair] if rule in (None, "tie", "unscored_pair") else []), counts


def _pair(
    row: Row, dialogues: list[list[Turn]], text: str | None, scores: Sequence[Any]
) -> tuple[Row, str | None]:
    chosen, rejected = dialogues
    if not (schema.well_ordered(chosen) and schema.well_ordered(rejected)):
        return {}, "bad_roles"
    # The column `prompt` is one string and not the conversation: the turns decide.
    if chosen[:-1] != rejected[:-1]:
        return {}, "different_prompts"
    if scores[0] < scores[1]:
        return {}, "inverted_scores"
    questions = [turn["content"] for turn in chosen if turn["role"] == "user"]
    prompt, prompt_id = schema.named_prompt(chosen[:-1], text)
    if not prompt.strip() or not all(text.strip() for text in questions):
        return {}, "empty_prompt"
    named = prompt, row.get("prompt_id") or prompt_id
    pair = binarize.pair_record(row, named, (chosen, rejected), scores)
    return pair, binarize.text_fault(chosen[-1]["content"], rejected[-1]["content"])


def _read(row: Row) -> tuple[list[list[Turn]], str | None, dict[str, str]]:
    """All turns up to each answer, the prompt if it comes in words, and the remarks."""
    reader, [key] = Reader(row, answers=True), schema.first_columns(row, _PROMPTS)
    schema.check_types(row, schema.OPTIONAL | dict.fromkeys(_SCORES[0], "number?"))
    prompt, columns, text = row.get(key), schema.first_columns(row, _ANSWERS), None
    context = reader.turns(key, "user", "none") if prompt is not None else []
    if schema.is_transcript(prompt):
        context = schema.transcript_turns(str(prompt))
        if context[-1] == {"role": "assistant", "content": ""}:
            context.pop()
    elif isinstance(prompt, str):
        text = schema.joined(prompt, row.get("input") if key == "instruction" else None)
        context = [{"role": "user", "content": text}]
    is_whole = text is not None and row.get("conversations") is None
    if row.get("conversations") is not None:
        context = reader.turns("conversations", learned="none")
    elif prompt is None:
        texts = [row[column] for column in columns if isinstance(row[column], str)]
        if not all(map(schema.is_transcript, texts)):
            raise BadRow("missing_key:prompt")
    context = reader.with_system(schema.plain(context)) if context else []
    return [_dialogue(reader, c, context, is_whole) for c in columns], text, reader.remarks


def _dialogue(reader: Reader, key: str, context: list[Turn], is_whole: bool) -> list[Turn]:
    """All turns up to the answer of a column, which may hold them all."""
    answer = reader.row[key]
    if schema.is_transcript(answer):
        return reader.with_system(schema.transcript_turns(answer))
    turns = schema.plain(reader.turns(key, "assistant", "last"))
    if turns and turns[0]["role"] in ("system", "user"):
        whole = reader.with_system(turns)
        # Turns that do not go on from a prompt in turns fall to the rule about roles.
        if is_whole or whole[: len(context)] == context:
            return whole
    return context + turns


def _rated(row: Row, rules: BinarizationRules) -> Records:
    if not isinstance(row["completions"], list):
        raise BadRow("wrong_type:completions")
    for i, answer in enumerate(row["completions"]):
        if not isinstance(answer, dict):
            raise BadRow(f"wrong_type:completions[{i}]")
        if not isinstance(answer.get("response"), str):
            raise BadRow(f"wrong_type:completions[{i}].response")
    schema.check_types(row, {"instruction": "text", "source": "text?"})
    return binarize.binarize(row, rules)


def _texts(row: Row, rule: str) -> list[str]:
    if "completions" in row:
        answers = [(a.get("overall_score"), a["response"]) for a in row["completions"]]
        return [f"{score}: {text}" for score, text in answers]
    dialogues, _, found = _read(row)
    names = schema.first_columns(row, _SCORES)
    if rule in found:
        return [found[rule]]
    answers = [turns[-1]["content"] if turns else "" for turns in dialogues]
    return [f"{row.get(name)}: {text}" for name, text in zip(names, answers, strict=True)]
