"""Ratings of several answers to one prompt -> one pair, chosen and rejected. Pure functions.

The pairs follow HuggingFaceH4/ultrafeedback_binarized: the answer with the highest
`overall_score` (the first of several) is chosen, and one of the others is drawn as rejected, even
at an equal score. Which pairs were drawn there is not public; here the draw hangs on the seed and
on the prompt alone, never on the order of the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from zephyr_jax.data.rows import Row, keyed_hash, prompt_digest, well_ordered

CRITERIA = ("overall_score", "mean_rating")


@dataclasses.dataclass(frozen=True)
class BinarizationRules:
    """How rated answers become a pair.

    `seed` decides which answer is rejected. `repair_scores` undoes the score-10 fault
    (`repair_overall_score`); zephyr-7b-beta itself was trained without that repair.
    """

    criterion: str = "overall_score"
    seed: int = 0
    repair_scores: bool = True
    keep_ties: bool = True

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"criterion {self.criterion!r} is unknown: choose one of {', '.join(CRITERIA)}"
            )


def mean_rating(completion: Mapping[str, Any]) -> float | None:
    """The mean of the aspect ratings (1 to 5) of one answer, or None when none was given.

    Ratings are strings, "N/A" among them. The first release of UltraFeedback wrapped each aspect
    in a list of one; both shapes are read.

    >>> mean_rating({"annotations": {"honesty": {"Rating": "4"}, "helpfulness": [{"Rating": "5"}]}})
    4.5
    >>> mean_rating({"annotations": {"honesty": {"Rating": "N/A"}}}) is None
    True
    """
    annotations = completion.get("annotations")
    ratings = []
    for aspect in (annotations if isinstance(annotations, Mapping) else {}).values():
        held = aspect[0] if isinstance(aspect, list) and aspect else aspect
        rating = str(held.get("Rating")).strip() if isinstance(held, Mapping) else ""
        if rating in {"1", "2", "3", "4", "5"}:
            ratings.append(int(rating))
    return sum(ratings) / len(ratings) if ratings else None


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
    score = _finite(completion.get("overall_score"))
    if score != 10.0:
        return score, None
    stored = _finite(completion.get("fine-grained_score"))
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


def _finite(value: object) -> float | None:
    """The value as a float, None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def binarize(row: Row, rules: BinarizationRules) -> tuple[Row | None, Counter[str]]:
    """One pair in the columns of the published set, or None, and the rules that had a say.

    Columns: prompt, prompt_id, chosen, rejected, messages (= chosen), score_chosen,
    score_rejected, source. `chosen` and `rejected` are lists of {role, content}. A row that holds
    `completions` is binarised; one that holds `chosen` already is checked and passed through.

    Counted and kept: `tie`, and the `score_10_*` rules and `unscored_completion`, which count
    answers and not rows. Counted and dropped: `too_few_scores`, `empty_prompt`, `empty_response`,
    `identical_text` and, without `keep_ties`, `tie_dropped`; of pairs that come ready also
    `missing_scores`, `bad_roles`, `different_prompts` (the turns before the answers differ) and
    `inverted_scores`.

    >>> answers = [{"response": r, "overall_score": s} for r, s in (("a", 3.0), ("b", 8.0))]
    >>> row = {"instruction": "Q?", "source": "flan", "completions": answers}
    >>> pair, counts = binarize(row, BinarizationRules())
    >>> pair["chosen"]
    [{'role': 'user', 'content': 'Q?'}, {'role': 'assistant', 'content': 'b'}]
    >>> pair["rejected"][-1]["content"], pair["score_chosen"], pair["score_rejected"], counts
    ('a', 8.0, 3.0, Counter())
    """
    pair, counts = _from_ratings(row, rules) if "completions" in row else _from_pair(row)
    if pair is None:
        return None, counts
    chosen, rejected = pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]
    if not pair["prompt"].strip():
        counts["empty_prompt"] += 1
        return None, counts
    if not chosen.strip() or not rejected.strip():
        counts["empty_response"] += 1
        return None, counts
    if chosen.strip() == rejected.strip():
        counts["identical_text"] += 1
        return None, counts
    if pair["score_chosen"] == pair["score_rejected"]:
        counts["tie" if rules.keep_ties else "tie_dropped"] += 1
        if not rules.keep_ties:
            return None, counts
    return pair, counts


def _from_ratings(row: Row, rules: BinarizationRules) -> tuple[Row | None, Counter[str]]:
    """The first best answer against one of the others, drawn by seed and prompt."""
    counts: Counter[str] = Counter()
    scored: list[tuple[float, str]] = []
    for completion in row["completions"]:
        if rules.criterion == "mean_rating":
            score, rule = mean_rating(completion), None
        elif rules.repair_scores:
            score, rule = repair_overall_score(completion)
        else:
            score, rule = _finite(completion.get("overall_score")), None
        if rule is not None:
            counts[rule] += 1
        if score is None:
            counts["unscored_completion"] += 1
        else:
            scored.append((score, completion["response"]))
    if len(scored) < 2:
        counts["too_few_scores"] += 1
        return None, counts
    prompt = row["instruction"]
    prompt_id = prompt_digest(prompt)
    best = max(range(len(scored)), key=lambda index: scored[index][0])
    others = scored[:best] + scored[best + 1 :]
    score_rejected, rejected = others[keyed_hash("rejected", rules.seed, prompt_id) % len(others)]
    score_chosen, chosen = scored[best]
    asked = {"role": "user", "content": prompt}
    messages = [asked, {"role": "assistant", "content": chosen}]
    pair = {
        "prompt": prompt,
        "prompt_id": prompt_id,
        "chosen": messages,
        "rejected": [asked, {"role": "assistant", "content": rejected}],
        "messages": messages,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "source": row.get("source") or "",
    }
    return pair, counts


def _from_pair(row: Row) -> tuple[Row | None, Counter[str]]:
    """A pair of the published schema, its messages in one order of keys."""
    chosen, rejected = (
        [{"role": turn["role"], "content": turn["content"]} for turn in row[key]]
        for key in ("chosen", "rejected")
    )
    score_chosen, score_rejected = _finite(row["score_chosen"]), _finite(row["score_rejected"])
    if score_chosen is None or score_rejected is None:
        return None, Counter(missing_scores=1)
    if not (well_ordered(chosen) and well_ordered(rejected)):
        return None, Counter(bad_roles=1)
    # The column `prompt` is one string and not the conversation: the turns decide.
    if chosen[:-1] != rejected[:-1]:
        return None, Counter(different_prompts=1)
    if score_chosen < score_rejected:
        return None, Counter(inverted_scores=1)
    asked = next(turn["content"] for turn in chosen if turn["role"] == "user")
    prompt = row.get("prompt") or asked
    pair = {
        "prompt": prompt,
        "prompt_id": row.get("prompt_id") or prompt_digest(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "source": row.get("source") or "",
    }
    return pair, Counter()
