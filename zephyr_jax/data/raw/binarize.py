"""Rated answers to one prompt -> pairs, chosen and rejected, as UltraFeedback is binarized.

By default the pairs follow HuggingFaceH4/ultrafeedback_binarized: the answer with the highest
`overall_score` (the first of several) is chosen, and a random one of the others is rejected, even
at an equal score. The random choices differ from those of that set, which depend on the order of
the answers and, in later revisions, of the rows; here they depend on the seed, the prompt and the
answers alone.

UltraFeedback's `correct_answers` and `incorrect_answers` (real only for TruthfulQA) are not used:
they are unrated, and TruthfulQA is a benchmark.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.raw.schema import Row, keyed_hash, prompt_digest

CRITERIA = ("overall_score", "mean_rating")
PAIRINGS = ("random", "best_vs_worst", "all")
TIES = ("keep", "drop", "mean_rating")
_RATINGS = {str(value): value for value in range(1, 6)}


@dataclasses.dataclass(frozen=True)
class BinarizationRules:
    """How rated answers become pairs; for ready pairs only `ties` and `drop_sources` matter.

    Attributes:
        criterion: the score that decides: the critique's `overall_score`, or the `mean_rating` of
            the aspects.
        pairing: which answers are compared: the best (the first of several) with one of the others,
            drawn by `seed` and prompt ("random"), or with the worst (the last of several)
            ("best_vs_worst"); or every two answers ("all").
        ties: what becomes of two answers with equal scores: "keep" takes them as they come ("all":
            in an order drawn by `seed`, prompt and texts), "drop" does not, and "mean_rating"
            chooses the one with the higher mean rating and drops the pair if there is none.
        seed: random seed.
        repair_scores: undo the score-10 fault (`repair_overall_score`); zephyr-7b-beta itself was
            trained without that repair.
        drop_sources: values of the column `source` to leave out, such as ("truthful_qa",).
    """

    criterion: str = "overall_score"
    pairing: str = "random"
    ties: str = "keep"
    seed: int = 0
    repair_scores: bool = True
    drop_sources: tuple[str, ...] = ()

    def __post_init__(self):
        for name, value, choices in (
            ("criterion", self.criterion, CRITERIA),
            ("pairing", self.pairing, PAIRINGS),
            ("ties", self.ties, TIES),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is unknown: choose one of {', '.join(choices)}")
        sources = self.drop_sources
        if not isinstance(sources, tuple) or not all(isinstance(s, str) and s for s in sources):
            raise ValueError(
                f'drop_sources={sources!r} is not a tuple of names: give such as ("truthful_qa",)'
            )


class _Answer(NamedTuple):
    score: float
    text: str
    mean: float | None


def binarize(row: Row, rules: BinarizationRules) -> tuple[list[Row], Counter[str]]:
    """The pairs of a rated row, none if a rule dropped all, and the rules that applied.

    A row holds `instruction`, `completions` and perhaps `source`; a pair holds prompt, prompt_id,
    chosen, rejected (lists of {role, content}), score_chosen, score_rejected, source.

    Counted and kept: `tie`, `tie_by_rating` (the mean ratings decided), `source_missing` (sources
    are to be dropped, and the row names none), and the `score_10_*` rules and
    `unscored_completion`, which count answers. Dropped rows: `source_dropped`, `empty_prompt`,
    `too_few_scores`. Dropped pairs: `empty_response`, `identical_text`, `tie_dropped`.

    >>> answers = [{"response": r, "overall_score": s} for r, s in (("a", 3.0), ("b", 8.0))]
    >>> row = {"instruction": "Q?", "source": "flan", "completions": answers}
    >>> [pair], counts = binarize(row, BinarizationRules())
    >>> pair["chosen"]
    [{'role': 'user', 'content': 'Q?'}, {'role': 'assistant', 'content': 'b'}]
    >>> pair["rejected"][-1]["content"], pair["score_chosen"], pair["score_rejected"], counts
    ('a', 8.0, 3.0, Counter())
    """
    counts, prompt = source_counts(row, rules), row["instruction"]
    if counts["source_dropped"]:
        return [], counts
    if not prompt.strip():
        counts["empty_prompt"] += 1
        return [], counts
    answers = _scored_answers(row, rules, counts)
    if len(answers) < 2:
        counts["too_few_scores"] += 1
        return [], counts
    prompt_id = prompt_digest(prompt)
    pairs = []
    for better, worse in _comparisons(answers, prompt_id, rules):
        rule = text_fault(better.text, worse.text)
        pair = None if rule else (better, worse)
        if pair and better.score == worse.score:
            pair, rule = _tied(better, worse, prompt_id, rules)
        if rule:
            counts[rule] += 1
        if pair:
            pairs.append(
                {
                    "prompt": prompt,
                    "prompt_id": prompt_id,
                    "chosen": exchange(prompt, pair[0].text),
                    "rejected": exchange(prompt, pair[1].text),
                    "score_chosen": pair[0].score,
                    "score_rejected": pair[1].score,
                    "source": row.get("source") or "",
                }
            )
    return pairs, counts


def source_counts(row: Row, rules: BinarizationRules) -> Counter[str]:
    """What `drop_sources` does to a row: nothing, `source_missing` or `source_dropped`."""
    if not rules.drop_sources:
        return Counter()
    if not row.get("source"):
        return Counter(source_missing=1)
    return Counter(source_dropped=1) if row["source"] in rules.drop_sources else Counter()


def _scored_answers(row: Row, rules: BinarizationRules, counts: Counter[str]) -> list[_Answer]:
    """The answers that have a score, in their order."""
    answers = []
    for completion in row["completions"]:
        mean, rule = mean_rating(completion), None
        if rules.criterion == "mean_rating":
            score = mean
        elif rules.repair_scores:
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


def _comparisons(
    answers: Sequence[_Answer], prompt_id: str, rules: BinarizationRules
) -> Iterator[tuple[_Answer, _Answer]]:
    """The pairs of answers that the rules compare, the higher score first."""
    by_score = sorted(answers, key=lambda answer: (answer.score, answer.text))
    if rules.pairing == "all":
        yield from itertools.combinations(reversed(by_score), 2)
        return
    best = max(answers, key=lambda answer: answer.score)
    if rules.pairing == "best_vs_worst":
        yield best, min(reversed(answers), key=lambda answer: answer.score)
        return
    # Drawn from a sorted list, so that the order of the answers does not matter.
    by_score.remove(best)
    yield best, by_score[keyed_hash("rejected", rules.seed, prompt_id) % len(by_score)]


def _tied(
    first: _Answer, second: _Answer, prompt_id: str, rules: BinarizationRules
) -> tuple[tuple[_Answer, _Answer] | None, str]:
    """Chosen and rejected of two equal scores, None if the tie is dropped, and the rule."""
    if rules.ties == "keep":
        key = "/".join((prompt_id, *map(prompt_digest, sorted((first.text, second.text)))))
        swap = rules.pairing == "all" and keyed_hash("tie", rules.seed, key) % 2
        return ((second, first) if swap else (first, second)), "tie"
    if rules.ties == "drop" or first.mean is None or second.mean in (None, first.mean):
        return None, "tie_dropped"
    return ((first, second) if first.mean > second.mean else (second, first)), "tie_by_rating"


def text_fault(chosen: str, rejected: str) -> str | None:
    """The rule by which two answers are not a pair: `empty_response`, `identical_text` or None."""
    if not chosen.strip() or not rejected.strip():
        return "empty_response"
    if chosen.strip() == rejected.strip():
        return "identical_text"
    return None


def exchange(prompt: str, answer: str) -> list[dict[str, str]]:
    """The two messages of a question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def mean_rating(completion: Mapping[str, Any]) -> float | None:
    """The mean of the aspect ratings (1 to 5) of one answer, or None without any.

    Ratings are strings, "N/A" among them. The first release of UltraFeedback wrapped each aspect
    in a list of one; both shapes are read. Parquet fills what is missing with None at any depth.

    >>> mean_rating({"annotations": {"honesty": {"Rating": "4"}, "helpfulness": [{"Rating": "5"}]}})
    4.5
    >>> mean_rating({"annotations": {"honesty": {"Rating": "N/A"}, "helpfulness": None}}) is None
    True
    """
    aspects = _struct(completion.get("annotations")).values()
    texts = (str(_struct(aspect).get("Rating")).strip() for aspect in aspects)
    # A column of numbers with a hole in it comes as floating point.
    ratings = [_RATINGS.get(text.removesuffix(".0")) for text in texts]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _struct(value: object) -> Mapping[str, Any]:
    """The struct that a value is or, as the first of a list, holds; empty without one."""
    struct = value[0] if isinstance(value, list) and value else value
    return struct if isinstance(struct, Mapping) else {}


def repair_overall_score(completion: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The overall score of one answer with the score-10 fault undone, and the rule that applied.

    The program that collected UltraFeedback stored a critique's score of 1 as 10. Its makers
    recognized true tens by the mean of the aspect ratings, as is done here; None means no score.

    * other than 10: as it is, no rule.
    * mean at most 2: the score was 1 (`score_10_to_1`).
    * mean above 4: a true 10 (`score_10_kept`).
    * in between the makers queried GPT-4 again. They wrote `fine-grained_score` into each answer
      in the same run, so where that field is a number the 10 is GPT-4's second word and stays
      (`score_10_reannotated`). Where it is missing the score is twice the mean rating, to the
      half point (`score_10_estimated`): the same opinion, on the scale of the scores.
    * no ratings at all: the 10 stays (`score_10_unrated`).

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
