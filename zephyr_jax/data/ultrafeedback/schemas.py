"""UltraFeedback rows, rated or published as pairs -> one pair of answers a row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

from zephyr_jax.data.preferences import BinarizationRules, binarize
from zephyr_jax.data.rows import Row, Schema, not_messages, window

NAME = "ultrafeedback"
SPLITS = ("train_prefs", "test_prefs")


def schemas(rules: BinarizationRules | None = None) -> dict[str, Schema]:
    """The schema of each configuration: `raw`, made into pairs, and `binarized`, checked only."""
    rules = rules or BinarizationRules()
    return {
        "raw": Schema(
            keys=("instruction", "completions"),
            forbidden=(),
            splits=SPLITS,
            problem=_raw_problem,
            convert=partial(_convert, rules=rules),
            excerpt=_excerpt,
            rules=dataclasses.asdict(rules),
        ),
        "binarized": Schema(
            keys=("chosen", "rejected", "score_chosen", "score_rejected"),
            forbidden=(),
            splits=SPLITS,
            problem=_published_problem,
            convert=partial(_convert, rules=rules),
            excerpt=_excerpt,
            rules={"keep_ties": rules.keep_ties},
        ),
    }


def _convert(row: Row, rules: BinarizationRules) -> tuple[Row | None, Counter[str]]:
    """The pair without `messages`, which only repeats `chosen`."""
    pair, counts = binarize(row, rules)
    if pair is not None:
        pair = {key: value for key, value in pair.items() if key != "messages"}
    return pair, counts


def _raw_problem(row: Row) -> str | None:
    if not isinstance(row["instruction"], str):
        return "wrong_type:instruction"
    answers = row["completions"]
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("response"), str) for answer in answers
    ):
        return "wrong_type:completions"
    return _optional_text(row, "source")


def _published_problem(row: Row) -> str | None:
    for key in ("chosen", "rejected"):
        if not_messages(row[key]):
            return f"wrong_type:{key}"
    return (
        _optional_text(row, "prompt")
        or _optional_text(row, "prompt_id")
        or _optional_text(row, "source")
    )


def _optional_text(row: Row, key: str) -> str | None:
    return None if isinstance(row.get(key), str | None) else f"wrong_type:{key}"


def _excerpt(rule: str, before: Row, after: Row | None) -> tuple[list[str], list[str] | None]:
    """Scores and the beginnings of the answers."""
    del rule
    shown = [_line(answer.get("overall_score"), answer["response"]) for answer in _answers(before)]
    return shown, None if after is None else [
        _line(answer["overall_score"], answer["response"]) for answer in _answers(after)
    ]


def _answers(row: Row) -> list[dict[str, Any]]:
    if "completions" in row:
        return row["completions"]
    return [
        {"overall_score": row[f"score_{key}"], "response": row[key][-1]["content"]}
        for key in ("chosen", "rejected")
        if row[key]
    ]


def _line(score: object, text: str) -> str:
    return f"{score}: {window(text)}"
