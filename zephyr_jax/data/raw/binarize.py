"""Rated answers to one prompt -> pairs, chosen and rejected; checks of pairs that come ready.

By default the pairs follow HuggingFaceH4/ultrafeedback_binarized: the answer with the highest
`overall_score` (the first of several) is chosen, and one of the others is drawn as rejected, even
at an equal score. The draws themselves are not those of that set, which hang on the order of the
answers and, in later revisions, of the rows; here every draw hangs on the seed, the prompt and the
answers alone.

UltraFeedback's `correct_answers` and `incorrect_answers` (real only for TruthfulQA) are not used:
nobody rated them, and TruthfulQA is a benchmark.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.raw.ratings import finite, mean_rating, repair_overall_score
from zephyr_jax.data.raw.schema import Row, keyed_hash, prompt_digest, well_ordered, window

CRITERIA = ("overall_score", "mean_rating")
PAIRINGS = ("random", "best_vs_worst", "all")
TIES = ("keep", "drop", "mean_rating")


@dataclasses.dataclass(frozen=True)
class BinarizationRules:
    """How rated answers become pairs. Of ready pairs only `ties` and `drop_sources` speak.

    `criterion` is the score that decides: the critique's `overall_score` or the `mean_rating` of
    the aspects. `pairing` says which answers meet:

    * "random": the best (the first of several) and one of the others, drawn by `seed` and prompt.
    * "best_vs_worst": the best (the first of several) and the worst (the last of several).
    * "all": every two answers, the one with the higher score chosen.

    `ties` says what becomes of two answers with equal scores: "keep" takes them as they met ("all":
    in an order drawn by `seed`, prompt and texts), "drop" does not, and "mean_rating" chooses the
    one with the higher mean rating and drops the pair if that is equal or not known.
    `repair_scores` undoes the score-10 fault (`ratings.repair_overall_score`); zephyr-7b-beta
    itself was trained without that repair. `drop_sources` are values of the column `source` to
    leave out: ("truthful_qa",) for one, which models are evaluated on.
    """

    criterion: str = "overall_score"
    pairing: str = "random"
    ties: str = "keep"
    seed: int = 0
    repair_scores: bool = True
    drop_sources: tuple[str, ...] = ()

    def __post_init__(self):
        for name, value, known in (
            ("criterion", self.criterion, CRITERIA),
            ("pairing", self.pairing, PAIRINGS),
            ("ties", self.ties, TIES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}")
        sources = self.drop_sources
        if not isinstance(sources, tuple) or not all(isinstance(s, str) and s for s in sources):
            raise ValueError(
                f'drop_sources={sources!r} is no tuple of names: give such as ("truthful_qa",)'
            )


class _Answer(NamedTuple):
    score: float
    text: str
    mean: float | None


def binarize(row: Row, rules: BinarizationRules) -> tuple[list[Row], Counter[str]]:
    """The pairs of a rated row, none if a rule dropped all, and the rules that had a say.

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
    counts = _source_counts(row, rules)
    if counts["source_dropped"]:
        return [], counts
    prompt = row["instruction"]
    if not prompt.strip():
        counts["empty_prompt"] += 1
        return [], counts
    answers, rated = _answers(row["completions"], rules)
    counts += rated
    if len(answers) < 2:
        counts["too_few_scores"] += 1
        return [], counts
    prompt_id = prompt_digest(prompt)
    pairs = []
    for met in _meetings(answers, prompt_id, rules):
        rule = text_fault(met[0].text, met[1].text)
        pair, tie = (None, rule) if rule else _settled(*met, prompt_id, rules)
        if tie is not None:
            counts[tie] += 1
        if pair is not None:
            chosen, rejected = pair
            pairs.append(
                {
                    "prompt": prompt,
                    "prompt_id": prompt_id,
                    "chosen": exchange(prompt, chosen.text),
                    "rejected": exchange(prompt, rejected.text),
                    "score_chosen": chosen.score,
                    "score_rejected": rejected.score,
                    "source": row.get("source") or "",
                }
            )
    return pairs, counts


def _source_counts(row: Row, rules: BinarizationRules) -> Counter[str]:
    """What the sources to drop say of a row: nothing, or one of two rules."""
    if not rules.drop_sources:
        return Counter()
    if not row.get("source"):
        return Counter(source_missing=1)
    return Counter(source_dropped=1) if row["source"] in rules.drop_sources else Counter()


def _answers(
    completions: Iterable[Mapping[str, Any]], rules: BinarizationRules
) -> tuple[list[_Answer], Counter[str]]:
    """The answers that have a score, in their order."""
    counts: Counter[str] = Counter()
    answers = []
    for completion in completions:
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
    return answers, counts


def _meetings(
    answers: Sequence[_Answer], prompt_id: str, rules: BinarizationRules
) -> Iterator[tuple[_Answer, _Answer]]:
    """The pairs of answers that the rules bring together, the higher score first."""
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


def _settled(
    better: _Answer, worse: _Answer, prompt_id: str, rules: BinarizationRules
) -> tuple[tuple[_Answer, _Answer] | None, str | None]:
    """Chosen and rejected, None if a tie is dropped, and the rule about ties that applied."""
    if better.score != worse.score:
        return (better, worse), None
    if rules.ties == "keep":
        texts = sorted((better.text, worse.text))
        key = "/".join((prompt_id, *map(prompt_digest, texts)))
        if rules.pairing == "all" and keyed_hash("tie", rules.seed, key) % 2:
            better, worse = worse, better
        return (better, worse), "tie"
    if rules.ties == "drop" or better.mean is None or worse.mean is None:
        return None, "tie_dropped"
    if better.mean == worse.mean:
        return None, "tie_dropped"
    return (better, worse) if better.mean > worse.mean else (worse, better), "tie_by_rating"


def text_fault(chosen: str, rejected: str) -> str | None:
    """The rule by which two answers are no pair: `empty_response`, `identical_text` or None."""
    if not chosen.strip() or not rejected.strip():
        return "empty_response"
    if chosen.strip() == rejected.strip():
        return "identical_text"
    return None


def exchange(prompt: str, answer: str) -> list[dict[str, str]]:
    """The two messages of a question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def check_pair(
    row: Row, rules: BinarizationRules, scored: bool = True
) -> tuple[list[Row], Counter[str]]:
    """A ready pair in the columns of `binarize`, none if a rule dropped it, and the rules.

    The row holds `chosen` and `rejected` as lists of {role, content}, and perhaps `score_chosen`,
    `score_rejected`, `prompt`, `prompt_id`, `source`. Without an id the prompt's digest is taken;
    of a prompt of several turns the digest of the turns before the answer as JSON.

    Counted and kept: `tie`, `source_missing`. Dropped: `source_dropped`, `missing_scores`,
    `bad_roles`, `different_prompts` (the turns before the answers differ), `inverted_scores`,
    `empty_prompt`, `empty_response`, `identical_text`, and unless ties are kept (nothing rates
    these answers further) `tie_dropped`.

    Args:
        row: the pair.
        rules: `ties` and `drop_sources` of them.
        scored: whether the pair has scores; one without is no tie and gets two of 0.0.

    >>> row = {"chosen": exchange("Q?", "b"), "rejected": exchange("Q?", "a")}
    >>> [pair], counts = check_pair(row, BinarizationRules(), scored=False)
    >>> pair["prompt"], pair["prompt_id"] == prompt_digest("Q?"), pair["score_chosen"], counts
    ('Q?', True, 0.0, Counter())
    >>> check_pair({**row, "score_chosen": 1, "score_rejected": 2}, BinarizationRules())
    ([], Counter({'inverted_scores': 1}))
    """
    counts = _source_counts(row, rules)
    if counts["source_dropped"]:
        return [], counts
    pair, rule = _checked(row, scored)
    if rule is None and scored and pair["score_chosen"] == pair["score_rejected"]:
        rule = "tie" if rules.ties == "keep" else "tie_dropped"
    if rule is not None:
        counts[rule] += 1
    return ([pair] if rule in (None, "tie") else []), counts


def _checked(row: Row, scored: bool) -> tuple[Row, str | None]:
    """The pair, its messages in one order of keys, or an empty one and the rule that drops it."""
    chosen, rejected = (
        [{"role": turn["role"], "content": turn["content"]} for turn in row[key]]
        for key in ("chosen", "rejected")
    )
    scores = [finite(row.get(key)) if scored else 0.0 for key in ("score_chosen", "score_rejected")]
    score_chosen, score_rejected = scores
    if score_chosen is None or score_rejected is None:
        return {}, "missing_scores"
    if not (well_ordered(chosen) and well_ordered(rejected)):
        return {}, "bad_roles"
    # The column `prompt` is one string and not the conversation: the turns decide.
    if chosen[:-1] != rejected[:-1]:
        return {}, "different_prompts"
    if score_chosen < score_rejected:
        return {}, "inverted_scores"
    asked = [turn["content"] for turn in chosen if turn["role"] == "user"]
    prompt = row.get("prompt") or asked[0]
    if not prompt.strip() or not all(text.strip() for text in asked):
        return {}, "empty_prompt"
    pair = {
        "prompt": prompt,
        "prompt_id": row.get("prompt_id") or _prompt_id(prompt, chosen[:-1], len(asked)),
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "source": row.get("source") or "",
    }
    return pair, text_fault(chosen[-1]["content"], rejected[-1]["content"])


def _prompt_id(prompt: str, turns: list[dict[str, str]], questions: int) -> str:
    """The digest of the prompt, or of all turns before the answer if there are several."""
    if questions == 1:
        return prompt_digest(prompt)
    said = json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return prompt_digest(said)


def shown_pair(rule: str, pairs: Sequence[Row]) -> list[str] | None:
    """Scores and beginnings of the first pair that a rule may have made, None if there is none."""
    ties = [p for p in pairs if p["score_chosen"] == p["score_rejected"]]
    for pair in (ties if ties and rule.startswith("tie") else pairs)[:1]:
        return [
            f"{pair[f'score_{key}']}: {window(pair[key][-1]['content'])}"
            for key in ("chosen", "rejected")
        ]
    return None
