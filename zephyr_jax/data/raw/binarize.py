"""Rated answers to one prompt -> pairs, chosen and rejected, as UltraFeedback is binarized.

As in HuggingFaceH4/ultrafeedback_binarized, the answer with the highest `overall_score` (the first
of several) is chosen, and a random one of the others is rejected, even at an equal score; here it
depends on the seed, the prompt and the answers alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.config import choose
from zephyr_jax.data.raw.schema import Records, Row, keyed_hash, prompt_digest

CRITERIA = ("overall_score", "mean_rating")
PAIRINGS = ("random", "best_vs_worst", "all")
TIES = ("keep", "drop", "mean_rating")
_RATINGS = ("1", "2", "3", "4", "5")


@dataclasses.dataclass(frozen=True)
class BinarizationRules:
    """How rated answers become pairs; for ready pairs only `ties` and `drop_sources` matter."""

    # The score that decides: the critique's `overall_score`, or the `mean_rating` of the aspects.
    criterion: str = "overall_score"
    # The best answer and one of the others, drawn by `seed` and prompt ("random"), or the best and
    # the worst, the last of several ("best_vs_worst"), or every two ("all").
    pairing: str = "random"
    # "keep" or "drop" pairs of equal scores, or choose the answer with the higher "mean_rating" and
    # drop the pair if that is equal or missing.
    ties: str = "keep"
    seed: int = 0
    # Undo the score-10 fault (`repair_overall_score`); zephyr-7b-beta was trained without that.
    repair_scores: bool = True
    drop_sources: tuple[str, ...] = ()  # values of the column `source`, such as "truthful_qa"

    def __post_init__(self):
        choose("criterion", self.criterion, CRITERIA)
        choose("pairing", self.pairing, PAIRINGS)
        choose("ties", self.ties, TIES)


class _Answer(NamedTuple):
    score: float
    text: str
    mean: float | None


def binarize(row: Row, rules: BinarizationRules) -> Records:
    """The pairs of a rated row, none if a rule dropped all, and the rules that applied."""
    counts, prompt = source_counts(row, rules), row["instruction"]
    if counts["source_dropped"]:
        return [], counts
    if not prompt.strip():
        return [], counts + Counter(empty_prompt=1)
    answers = _scored_answers(row, rules, counts)
    if len(answers) < 2:
        return [], counts + Counter(too_few_scores=1)
    prompt_id, pairs = prompt_digest(prompt), []
    question = {"role": "user", "content": prompt}
    for chosen, rejected in _candidates(answers, prompt_id, rules):
        rule = text_fault(chosen.text, rejected.text)
        if rule is None and chosen.score == rejected.score:
            chosen, rejected, rule = _settle_tie(chosen, rejected, rules.ties)
        if rule is not None:
            counts[rule] += 1
        if rule in (None, "tie", "tie_by_rating"):
            both = chosen, rejected
            turns = [[question, {"role": "assistant", "content": one.text}] for one in both]
            pairs.append(pair_record(row, (prompt, prompt_id), turns, [one.score for one in both]))
    return pairs, counts


def pair_record(
    row: Row, named: tuple[str, str], turns: Sequence[Any], scores: Sequence[float]
) -> Row:
    """The pair of a row from its prompt and id, and the turns and scores of both answers."""
    record = {"prompt": named[0], "prompt_id": named[1], "chosen": turns[0], "rejected": turns[1]}
    record |= {"score_chosen": scores[0], "score_rejected": scores[1]}
    return record | {"source": row.get("source") or ""}


def _candidates(
    answers: Sequence[_Answer], prompt_id: str, rules: BinarizationRules
) -> list[tuple[_Answer, _Answer]]:
    """The pairs that the rules compare, the answer with the higher score first."""
    # Sorted, so that the order of the answers does not matter.
    others = sorted(answers, key=lambda one: (one.score, one.text))
    if rules.pairing == "all":
        drawn = functools.partial(keyed_hash, "tie", rules.seed)
        others.sort(key=lambda one: (-one.score, drawn(prompt_id + one.text)))
        return list(itertools.combinations(others, 2))
    best = max(answers, key=lambda answer: answer.score)
    if rules.pairing == "best_vs_worst":
        return [(best, min(reversed(answers), key=lambda answer: answer.score))]
    others.remove(best)
    return [(best, others[keyed_hash("rejected", rules.seed, prompt_id) % len(others)])]


def _settle_tie(one: _Answer, two: _Answer, ties: str) -> tuple[_Answer, _Answer, str]:
    """The chosen and the rejected one of two answers of equal scores, and the rule that applied."""
    if ties == "keep":
        return one, two, "tie"
    if ties == "drop" or one.mean is None or two.mean is None or one.mean == two.mean:
        return one, two, "tie_dropped"
    return (one, two, "tie_by_rating") if one.mean > two.mean else (two, one, "tie_by_rating")


def source_counts(row: Row, rules: BinarizationRules) -> Counter[str]:
    """What `drop_sources` does to a row: nothing, `source_missing` or `source_dropped`."""
    if rules.drop_sources and not row.get("source"):
        return Counter(source_missing=1)
    return Counter(source_dropped=1) if row.get("source") in rules.drop_sources else Counter()


def text_fault(chosen: str, rejected: str) -> str | None:
    """The rule by which two answers are not a pair: `empty_response`, `identical_text` or None."""
    if not chosen.strip() or not rejected.strip():
        return "empty_response"
    return "identical_text" if chosen.strip() == rejected.strip() else None


def _scored_answers(row: Row, rules: BinarizationRules, counts: Counter[str]) -> list[_Answer]:
    answers = []
    for completion in row["completions"]:
        mean, rule = mean_rating(completion), None
        if rules.criterion == "mean_rating":
            score = mean
        elif rules.repair_scores and "collected_by" not in row:  # our own scores lack that fault
            score, rule = repair_overall_score(completion)
        else:
            score = finite(completion.get("overall_score"))
        if rule is not None:
            counts[rule] += 1
        if score is None:
            counts["unscored_completion"] += 1
        else:
            answers.append(_Answer(score, completion["response"], mean))
    return answers


def mean_rating(completion: Mapping[str, Any]) -> float | None:
    """The mean aspect rating (1 to 5, as texts) or None; an aspect may be in a list of one."""

    def struct(value: object) -> Mapping[str, Any]:
        first = value[0] if isinstance(value, list) and value else value
        return first if isinstance(first, Mapping) else {}

    aspects = struct(completion.get("annotations")).values()
    # A column of numbers with a hole in it comes as floating point.
    texts = (str(struct(aspect).get("Rating")).strip().removesuffix(".0") for aspect in aspects)
    numbers = [int(text) for text in texts if text in _RATINGS]
    return sum(numbers) / len(numbers) if numbers else None


def repair_overall_score(completion: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The overall score of one answer with the score-10 fault undone, and the rule that applied.

    The program that collected UltraFeedback stored a score of 1 as 10. Its makers recognized true
    tens by the mean of the aspect ratings (at most 2: it was a 1; above 4: a 10), as is done here.
    In between they queried GPT-4 again, and wrote `fine-grained_score` into each answer: where that
    is a number the 10 stays, else the score is twice the mean rating, to the half point.
    """
    score = finite(completion.get("overall_score"))
    if score != 10.0:
        return score, None
    stored = finite(completion.get("fine-grained_score"))
    mean = stored if stored is not None else mean_rating(completion)
    if mean is None:
        return score, "score_10_unrated"
    if mean <= 2.0:
        return 1.0, "score_10_to_1"
    if mean > 4.0:
        return score, "score_10_kept"
    if stored is not None:
        return score, "score_10_reannotated"
    return math.floor(4.0 * mean + 0.5) / 2.0, "score_10_estimated"


def finite(value: object) -> float | None:
    """The value as a float, None unless it is a number that float32 has, perhaps in a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 3.4e38 else None
