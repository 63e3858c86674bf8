"""What the judge of UltraFeedback said about one answer: aspect ratings, overall score, repair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_RATINGS = {str(value): value for value in range(1, 6)}


def mean_rating(completion: Mapping[str, Any]) -> float | None:
    """The mean of the aspect ratings (1 to 5) of one answer, or None when none was given.

    Ratings are strings, "N/A" among them. The first release of UltraFeedback wrapped each aspect
    in a list of one; both shapes are read. Parquet fills what is missing with None at any depth.

    >>> mean_rating({"annotations": {"honesty": {"Rating": "4"}, "helpfulness": [{"Rating": "5"}]}})
    4.5
    >>> mean_rating({"annotations": {"honesty": {"Rating": "N/A"}, "helpfulness": None}}) is None
    True
    """
    aspects = _struct(completion.get("annotations")).values()
    said = (str(_struct(aspect).get("Rating")).strip() for aspect in aspects)
    # A column of numbers with a hole in it comes as floating point.
    ratings = [_RATINGS.get(rating.removesuffix(".0")) for rating in said]
    given = [rating for rating in ratings if rating is not None]
    return sum(given) / len(given) if given else None


def _struct(value: object) -> Mapping[str, Any]:
    """The struct that a value is or, as the first of a list, holds; empty if there is none."""
    held = value[0] if isinstance(value, list) and value else value
    return held if isinstance(held, Mapping) else {}


def repair_overall_score(completion: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The overall score of one answer with the score-10 fault undone, and the rule that applied.

    The program that collected UltraFeedback stored a critique's score of 1 as 10. Its makers told
    the true tens by the mean of the aspect ratings, and so do we; None stands for no score.

    * other than 10: as it is, no rule.
    * mean at most 2: the score was 1 (`score_10_to_1`).
    * mean above 4: a true 10 (`score_10_kept`).
    * in between the makers asked GPT-4 again. They wrote `fine-grained_score` into each answer
      in the same run, so where that field is a number the 10 is GPT-4's second word and stays
      (`score_10_reannotated`). Where it is missing the score is twice the mean rating, to the
      half point (`score_10_estimated`): the same opinion, brought to the scale of the scores.
    * no ratings at all: nothing to tell by, the 10 stays (`score_10_unrated`).

    >>> repair_overall_score({"overall_score": 10, "fine-grained_score": 1.5})
    (1.0, 'score_10_to_1')
    >>> aspects = {"honesty": {"Rating": "3"}, "helpfulness": {"Rating": "4"}}
    >>> repair_overall_score({"overall_score": 10, "annotations": aspects})
    (7.0, 'score_10_estimated')
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
    """The value as a float, None unless it is a finite number.

    >>> finite(3), finite("3"), finite(float("nan")), finite(True)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
