"""Pairs in every shape that is read -> {prompt, prompt_id, chosen, rejected, scores, source}."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from zephyr_jax.data.raw import binarize
from zephyr_jax.data.raw.binarize import BinarizationRules, finite
from zephyr_jax.data.raw.schema import Row, Schema, Turn, first_columns, joined, named_prompt
from zephyr_jax.data.raw.turns import (
    is_dropping,
    is_transcript,
    listed,
    plain,
    read_turns,
    remarks,
    transcript_turns,
    well_ordered,
    with_system,
    wrong_type,
)

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
_OPTIONAL = dict.fromkeys(("prompt_id", "source", "system", "input"), "text?")


def ultrafeedback_schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """UltraFeedback's schemas: `raw`, made into pairs, and `binarized`, checked only."""
    rules = rules or BinarizationRules()
    rated = Schema(
        shapes=(RATED,),
        splits=SPLITS,
        problem=_rated_problem,
        convert=partial(binarize.binarize, rules=rules),
        texts=_texts,
        rules=dataclasses.asdict(rules),
    )
    return {"raw": rated, "binarized": _ready_pairs(PUBLISHED, rules, scored=True)}


def own_schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema `own` of the user's pairs; of the rules `ties` and `drop_sources` apply."""
    return {"own": _ready_pairs(OWN, rules or BinarizationRules(), scored=False)}


def _ready_pairs(
    shapes: tuple[tuple[str, ...], ...], rules: BinarizationRules, scored: bool
) -> Schema:
    return Schema(
        shapes=shapes,
        splits=SPLITS,
        problem=problem,
        convert=partial(convert, rules=rules, scored=scored),
        texts=_texts,
        rules={"ties": rules.ties, "drop_sources": list(rules.drop_sources)},
    )


def convert(
    row: Row, rules: BinarizationRules, scored: bool = False
) -> tuple[list[Row], Counter[str]]:
    """The pair of a row, none if a rule dropped it, and the rules that applied.

    Shapes, rules and ids are those of `prepare/sets/preferences/README.md`. If the answers hold all
    turns these decide, and a prompt in words is only the name. A pair without scores is dropped if
    they have to be `scored` (`missing_scores`); else it gets two of 0.0.
    """
    counts = binarize.source_counts(row, rules)
    counts += Counter(_remarks(row).keys())
    if counts["source_dropped"] or any(map(is_dropping, counts)):
        return [], counts
    names = first_columns(row, _SCORES)
    scores = [finite(row.get(name)) for name in names]
    pair, rule = _pair(row, [0.0 if None in scores else score for score in scores])
    if rule is None and None in scores and scored:
        rule = "missing_scores"
    elif rule is None and None in scores and any(row.get(n) is not None for n in _ALL_SCORES):
        rule = "unscored_pair"
    elif rule is None and None not in scores and scores[0] == scores[1]:
        rule = "tie" if rules.ties == "keep" else "tie_dropped"
    if rule is not None:
        counts[rule] += 1
    return ([pair] if rule in (None, "tie", "unscored_pair") else []), counts


def _pair(row: Row, scores: Sequence[Any]) -> tuple[Row, str | None]:
    """The pair, or an empty one and the rule that drops it."""
    context = _context(row)
    chosen, rejected = (_dialogue(context, row, key) for key in first_columns(row, _ANSWERS))
    if not (well_ordered(chosen) and well_ordered(rejected)):
        return {}, "bad_roles"
    # The column `prompt` is one string and not the conversation: the turns decide.
    if chosen[:-1] != rejected[:-1]:
        return {}, "different_prompts"
    if scores[0] < scores[1]:
        return {}, "inverted_scores"
    questions = [turn["content"] for turn in chosen if turn["role"] == "user"]
    prompt, prompt_id = named_prompt(chosen[:-1], _prompt_text(row))
    if not prompt.strip() or not all(text.strip() for text in questions):
        return {}, "empty_prompt"
    named = prompt, row.get("prompt_id") or prompt_id
    pair = binarize.pair_record(row, named, (chosen, rejected), scores)
    return pair, binarize.text_fault(chosen[-1]["content"], rejected[-1]["content"])


def _remarks(row: Row) -> dict[str, str]:
    """`remarks` of a row, of which the last turns of both answers are learned from."""
    answers = [listed(row[key]) for key in first_columns(row, _ANSWERS)]
    context = [*listed(row.get("prompt")), *listed(row.get("conversations"))]
    last = [turns[-1] for turns in answers if turns]
    context += [turn for turns in answers for turn in turns[:-1]]
    return remarks(row, last, context, answers=True)


def _prompt_text(row: Row) -> str | None:
    """The prompt in words, None if it comes in turns or not at all."""
    [key] = first_columns(row, _PROMPTS)
    prompt = row.get(key)
    if not isinstance(prompt, str) or is_transcript(prompt):
        return None
    return joined(prompt, row.get("input") if key == "instruction" else None)


def _context(row: Row) -> list[Turn]:
    """The turns before the answers that are in columns of their own."""
    [key] = first_columns(row, _PROMPTS)
    prompt, text = row.get(key), _prompt_text(row)
    if row.get("conversations") is None and text is None and isinstance(prompt, str):
        turns = transcript_turns(prompt)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
    else:
        columns = (row.get("conversations"), text, prompt, [])
        turns = plain(read_turns(next(value for value in columns if value is not None)))
    return with_system(row, turns) if turns else []


def _dialogue(context: list[Turn], row: Row, key: str) -> list[Turn]:
    """All turns up to the answer of a column."""
    answer = row[key]
    if is_transcript(answer):
        return with_system(row, transcript_turns(answer))
    turns = plain(read_turns(answer, "assistant"))
    if turns and turns[0]["role"] in ("system", "user"):
        whole = with_system(row, turns)
        # Turns that do not go on from a prompt in turns fall to the rule about roles.
        in_words = _prompt_text(row) is not None and row.get("conversations") is None
        if in_words or whole[: len(context)] == context:
            return whole
    return context + turns


def problem(row: Row) -> str | None:
    """The reason why the values of a pair do not fit, as `reason:place`, or None."""
    [key], answers = first_columns(row, _PROMPTS), first_columns(row, _ANSWERS)
    scores = dict.fromkeys(_SCORES[0], "number?")
    columns = _OPTIONAL | scores | {key: "text or turns?", "conversations": "turns?"}
    reason = wrong_type(row, columns | dict.fromkeys(answers, "text or turns"))
    if reason or row.get(key) is not None or row.get("conversations") is not None:
        return reason
    texts = [row[answer] for answer in answers if isinstance(row[answer], str)]
    return None if all(map(is_transcript, texts)) else "missing_key:prompt"


def _rated_problem(row: Row) -> str | None:
    if not isinstance(row["completions"], list):
        return "wrong_type:completions"
    for i, answer in enumerate(row["completions"]):
        if not isinstance(answer, dict):
            return f"wrong_type:completions[{i}]"
        if not isinstance(answer.get("response"), str):
            return f"wrong_type:completions[{i}].response"
    return wrong_type(row, {"instruction": "text", "source": "text?"})


def _texts(row: Row, rule: str) -> list[str]:
    """The answers with their scores, or what `remarks` names."""
    if "completions" in row:
        answers = [(a.get("overall_score"), a["response"]) for a in row["completions"]]
        return [f"{score}: {text}" for score, text in answers]
    context, names = _context(row), first_columns(row, _SCORES)
    dialogues = [_dialogue(context, row, key) for key in first_columns(row, _ANSWERS)]
    if rule in (found := _remarks(row)):
        return [found[rule]]
    answers = [turns[-1]["content"] if turns else "" for turns in dialogues]
    return [f"{row.get(name)}: {text}" for name, text in zip(names, answers, strict=True)]
