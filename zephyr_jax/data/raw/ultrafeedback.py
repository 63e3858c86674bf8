"""UltraFeedback rows, rated or published as pairs -> pairs of a chosen and a rejected answer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

from zephyr_jax.data.raw.binarize import (
    BinarizationRules,
    binarize,
    check_pair,
    exchange,
    shown_pair,
)
from zephyr_jax.data.raw.schema import Row, Schema, not_messages, window

NAME = "ultrafeedback"
SPLITS = ("train_prefs", "test_prefs")

# HuggingFaceH4/ultrafeedback_binarized, allenai/ultrafeedback_binarized_cleaned (with a source) and
# trl-lib/ultrafeedback_binarized (without prompt).
_H4 = ("chosen", "rejected", "score_chosen", "score_rejected")
# argilla/ultrafeedback-binarized-preferences, and the same cleaned.
_ARGILLA = (
    "instruction",
    "chosen_response",
    "rejected_response",
    "chosen_avg_rating",
    "rejected_avg_rating",
)
_CLEANED = ("prompt", "chosen", "chosen-rating", "rejected", "rejected-rating")


def schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema of each configuration: `raw`, made into pairs, and `binarized`, checked only."""
    rules = rules or BinarizationRules()
    return {
        "raw": Schema(
            shapes=(("instruction", "completions"),),
            forbidden=(),
            splits=SPLITS,
            problem=_raw_problem,
            convert=partial(binarize, rules=rules),
            excerpt=_excerpt,
            rules=dataclasses.asdict(rules),
        ),
        "binarized": Schema(
            shapes=(_H4, _ARGILLA, _CLEANED),
            forbidden=(),
            splits=SPLITS,
            problem=_published_problem,
            convert=partial(convert_published, rules=rules),
            excerpt=_excerpt,
            rules={"ties": rules.ties, "drop_sources": list(rules.drop_sources)},
        ),
    }


def convert_published(row: Row, rules: BinarizationRules) -> tuple[list[Row], Counter[str]]:
    """The published pair in our columns, none if a rule of `check_pair` dropped it, and the rules.

    >>> row = {"source": "flan_v2_cot", "instruction": "Q?", "chosen_response": "b"}
    >>> row |= {"rejected_response": "a", "chosen_avg_rating": 4.5, "rejected_avg_rating": 3}
    >>> [pair], counts = convert_published(row, BinarizationRules())
    >>> pair["chosen"][-1], pair["score_rejected"], pair["source"], counts
    ({'role': 'assistant', 'content': 'b'}, 3.0, 'flan_v2_cot', Counter())
    >>> convert_published(row, BinarizationRules(drop_sources=("flan_v2_cot",)))
    ([], Counter({'source_dropped': 1}))
    """
    return check_pair(_as_h4(row), rules)


def _as_h4(row: Row) -> Row:
    """Any published pair with its answers and scores under the names that HuggingFaceH4 uses."""
    shape = _shape(row)
    if shape == _ARGILLA:
        prompt = row["instruction"]
        return {
            **row,
            "chosen": exchange(prompt, row["chosen_response"]),
            "rejected": exchange(prompt, row["rejected_response"]),
            "score_chosen": row["chosen_avg_rating"],
            "score_rejected": row["rejected_avg_rating"],
        }
    if shape == _CLEANED:
        return {
            **row,
            "score_chosen": row["chosen-rating"],
            "score_rejected": row["rejected-rating"],
        }
    return row


def _shape(row: Row) -> tuple[str, ...]:
    """The first shape that a row has."""
    return next(shape for shape in (_H4, _ARGILLA, _CLEANED) if all(key in row for key in shape))


def _raw_problem(row: Row) -> str | None:
    if not isinstance(row["instruction"], str):
        return "wrong_type:instruction"
    if not isinstance(row["completions"], list):
        return "wrong_type:completions"
    for i, answer in enumerate(row["completions"]):
        if not isinstance(answer, dict):
            return f"wrong_type:completions[{i}]"
        if not isinstance(answer.get("response"), str):
            return f"wrong_type:completions[{i}].response"
    return _optional_text(row, "source")


def _published_problem(row: Row) -> str | None:
    if _shape(row) == _ARGILLA:
        for key in ("instruction", "chosen_response", "rejected_response"):
            if not isinstance(row[key], str):
                return f"wrong_type:{key}"
        return _optional_text(row, "source")
    for key in ("chosen", "rejected"):
        if not_messages(row[key]):
            return f"wrong_type:{key}"
    return _optional_text(row, "prompt", "prompt_id", "source")


def _optional_text(row: Row, *keys: str) -> str | None:
    wrong = (f"wrong_type:{key}" for key in keys if not isinstance(row.get(key), str | None))
    return next(wrong, None)


def _excerpt(rule: str, before: Row, after: list[Row]) -> tuple[list[str], list[str] | None]:
    """Scores and the beginnings of the answers."""
    if "completions" in before:
        shown = [
            f"{answer.get('overall_score')}: {window(answer['response'])}"
            for answer in before["completions"]
        ]
    else:
        pair = _as_h4(before)
        shown = [
            f"{pair[f'score_{key}']}: {window(pair[key][-1]['content'] if pair[key] else '')}"
            for key in ("chosen", "rejected")
        ]
    return shown, shown_pair(rule, after)
