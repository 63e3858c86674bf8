"""What a judge is worth: its agreement, its consistency, and its biases, with intervals.

Shares are over pairs of answers to one prompt (but for `ties`, those that the judge rates
differently). An interval holds 95% of bootstrap samples over prompts.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.evaluation.evaluate import intervals, mean_of
from zephyr_jax.feedback.config import ASPECTS, OVERALL
from zephyr_jax.feedback.judges import NOT_RATED, rating_of, recorded_ratings

ROWS, JUDGEMENTS = "ultrafeedback.jsonl", "judgements.jsonl"
MEASURES = {
    "ties": "how often two answers are rated alike",
    "first_shown_wins": "how often the answer that is shown first wins",
    "longer_wins": "how often the longer answer wins",
    "self_agreement": "how often a repeat in the reverse order prefers the same answer",
    "accuracy": "how often the answer with the higher recorded rating wins",
    "longer_wins_as_recorded": "how often the longer answer has the higher recorded rating",
    "longer_wins_beyond_recorded": "how much more often the longer answer wins than by the record",
    "spearman": "rank correlation with the recorded ratings (Spearman)",
}
_ALL_ALIKE = 0.9

Truth = Mapping[tuple[str, str, str], float]  # prompt id, contestant, form -> recorded rating
Measures = dict[str, dict[str, float]]  # name -> value, low, high and n, the cases behind it


class Pairs(NamedTuple):
    """Two answers to one prompt, `N` times, and what speaks for the first (above 0) of them."""

    prompts: np.ndarray  # ids
    rated: np.ndarray  # the judge's rating of it less the other's; NaN: not both rated
    earlier: np.ndarray  # the same in the judgement before, which had the reverse order
    recorded: np.ndarray  # the same of the record
    shown: np.ndarray  # 1: shown first, -1: the other, 0: no order
    length: np.ndarray  # characters more than the other has


def judge_quality(folder: Path, recorded: str = "", samples: int = 1000) -> dict[str, Any]:
    """The measures of a collected round's judge by form, and sentences on what is wrong with it.

    `recorded` is a file of rated rows, such as UltraFeedback's, against which the judge is held; of
    one that was not asked the scores are.

    Raises:
        FileNotFoundError: if the folder holds no round.
        ValueError: if the judge was not asked and nothing is recorded, or not of these answers.
    """
    paths = folder / JUDGEMENTS, folder / ROWS
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"{folder} holds no {JUDGEMENTS}; collect a round there first")
    judgements, rows = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths
    )
    if not judgements and not recorded:
        raise ValueError(
            f"the judge of {folder} was not asked, so it has no order and no repeats; name "
            "recorded ratings to hold its scores against"
        )
    truth = _truth(rows, recorded) if recorded else {}
    unreadable = sum(each["ratings"] is None for each in judgements)
    counts = {"judgements": len(judgements), "unreadable": unreadable}
    judgements = judgements or [_judgement(row, form) for row in rows for form in _FORMS]
    forms = measures(judgements, truth, samples)
    drawn = {form: _drawn(own) for form, own in _by_form(judgements).items() if form in forms}
    return {"forms": forms, **counts, "findings": findings(forms), "drawn": drawn}


_FORMS = (OVERALL, *ASPECTS)


def _judgement(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The scores of a row as a judgement, without an order."""
    completions = row["completions"]
    ratings = [rating_of(each, form) for each in completions]
    return {
        "prompt_id": prompt_digest(row["instruction"]),
        "form": form,
        "repeat": 0,
        "order": None,
        "contestants": [each["model"] for each in completions],
        "lengths": [len(each["response"]) for each in completions],
        "ratings": [NOT_RATED if rating is None else rating for rating in ratings],
    }


def _truth(rows: Sequence[Mapping[str, Any]], recorded: str) -> Truth:
    known, truth = recorded_ratings(recorded), {}
    for row, form in itertools.product(rows, _FORMS):
        prompt_id = prompt_digest(row["instruction"])
        for completion in row["completions"]:
            rated = known.get((prompt_id, completion["response"]), {})
            if (value := rating_of(rated, form)) is not None:
                truth[prompt_id, completion["model"], form] = value
    if not truth:
        raise ValueError(f"{recorded} rates none of the round's answers")
    return truth


def _by_form(judgements: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The judgements of each form that could be read."""
    groups = defaultdict(list)
    for each in judgements:
        groups[each["form"]] += [each] if each["ratings"] else []
    return groups


def _numbers(judgement: Mapping[str, Any]) -> list[float]:
    return [np.nan if rating == NOT_RATED else float(rating) for rating in judgement["ratings"]]


def _recorded(judgement: Mapping[str, Any], truth: Truth) -> list[float]:
    keys = [(judgement["prompt_id"], x, judgement["form"]) for x in judgement["contestants"]]
    return [truth.get(key, np.nan) for key in keys]


def _pairs(judgements: Sequence[Mapping[str, Any]], truth: Truth) -> Pairs:
    """All pairs of answers in judgements on one form."""
    rows, earlier = [], {}
    for each in judgements:
        ratings, recorded = _numbers(each), _recorded(each, truth)
        place, length = np.argsort(each["order"] or []), each["lengths"]
        for i, j in itertools.combinations(range(len(ratings)), 2):
            key, rated = (each["prompt_id"], i, j, each["repeat"] // 2), ratings[i] - ratings[j]
            shown = np.sign(place[j] - place[i]) if len(place) else 0
            before, known = earlier.get(key, np.nan), recorded[i] - recorded[j]
            rows.append((key[0], rated, before, known, shown, length[i] - length[j]))
            earlier[key] = rated
    columns: Any = zip(*rows, strict=True) if rows else [()] * len(Pairs._fields)
    return Pairs(*map(np.asarray, columns))


def measures(
    judgements: Sequence[Mapping[str, Any]], truth: Truth | None = None, samples: int = 1000
) -> dict[str, Measures]:
    """The measures of each form of which something can be measured."""
    out = {}
    for form, own in _by_form(judgements).items():
        prompts, *differences = _pairs(own, truth or {})
        rated, earlier, recorded, shown, longer = map(np.sign, differences)
        decided, known = np.abs(rated) == 1, np.abs(recorded) == 1
        unequal = decided & (longer != 0)
        excess = (rated == longer).astype(float) - (recorded == longer)
        cases = {
            "ties": (rated == 0, ~np.isnan(rated)),
            "first_shown_wins": (rated == shown, decided & (shown != 0)),
            "longer_wins": (rated == longer, unequal),
            "self_agreement": (rated == earlier, decided & (np.abs(earlier) == 1)),
            "accuracy": (rated == recorded, decided & known),
            "longer_wins_as_recorded": (recorded == longer, unequal & known),
            "longer_wins_beyond_recorded": (excess, unequal & known),
        }
        found: Measures = {}
        for name, (values, counted) in cases.items():
            if counted.any():
                mean = {"x": mean_of(values[counted])}
                drawn = intervals(mean, prompts[counted], samples=samples)["x"]
                found[name] = {**drawn._asdict(), "n": int(counted.sum())}
        out[form] = found | _spearman(own, truth or {}, samples)
    return {form: found for form, found in out.items() if found}


def _spearman(judgements: Sequence[Mapping[str, Any]], truth: Truth, samples: int) -> Measures:
    """The correlation of the ranks of ratings and of the record; {} where either is constant."""
    columns = [np.concatenate([_numbers(x) for x in judgements])]
    columns.append(np.concatenate([_recorded(x, truth) for x in judgements]))
    sizes = [len(x["ratings"]) for x in judgements]
    prompts = np.repeat([x["prompt_id"] for x in judgements], sizes)
    counted = ~np.isnan(columns).any(axis=0)
    if any(len(np.unique(column[counted])) < 2 for column in columns):
        return {}
    ranks = stats.rankdata(np.stack(columns)[:, counted], axis=1)
    names, which = np.unique(prompts[counted], return_inverse=True)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(samples):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        (a, ab), (_, b) = np.cov(ranks, fweights=times[which])
        drawn.append(ab / np.sqrt(a * b) if a * b else np.nan)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    value = float(np.corrcoef(ranks)[0, 1])
    found = {"value": value, "low": float(low), "high": float(high), "n": int(counted.sum())}
    return {"spearman": found}


def _drawn(judgements: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What a page draws of a form, by title."""
    pairs = _pairs(judgements, {})
    ratings = np.concatenate([_numbers(each) for each in judgements])
    values = {
        "Ratings": ratings,
        "Shown first minus shown later": (pairs.rated * pairs.shown)[pairs.shown != 0],
        "Longer minus shorter": (pairs.rated * np.sign(pairs.length))[pairs.length != 0],
    }
    return {title: each[~np.isnan(each)] for title, each in values.items()}


def findings(forms: Mapping[str, Measures]) -> list[str]:
    """What the intervals prove to be wrong, a sentence each; nothing where they leave room."""
    out = []
    for form, found in forms.items():
        if found.get("ties", {}).get("value", 0.0) > _ALL_ALIKE:
            out.append(f"{form}: rates nearly every answer alike, so few pairs can be made")
        first, beyond = found.get("first_shown_wins"), found.get("longer_wins_beyond_recorded")
        if first and not first["low"] <= 0.5 <= first["high"]:
            side = "first" if first["value"] > 0.5 else "last"
            out.append(f"{form}: prefers what is shown {side} ({_shown(first)}; fair is 50%)")
        longer = found.get("longer_wins")
        if beyond and not beyond["low"] <= 0 <= beyond["high"]:
            word = "longer" if beyond["value"] > 0 else "shorter"
            out.append(
                f"{form}: prefers {word} answers beyond the recorded ratings "
                f"({_shown(beyond)}; fair is 0%)"
            )
        elif not beyond and longer and longer["low"] > 0.75:
            out.append(
                f"{form}: the longer answer wins {_shown(longer)}; whether it is also better only "
                "recorded ratings can say"
            )
        for name, problem in (
            ("self_agreement", "contradicts itself as chance would"),
            ("accuracy", "agrees with the record no better than chance"),
        ):
            if name in found and found[name]["low"] <= 0.5:
                out.append(f"{form}: {problem} ({_shown(found[name])})")
    return out


def _shown(interval: Mapping[str, float]) -> str:
    low, high = (f"{100 * interval[name]:.0f}%" for name in ("low", "high"))
    return f"{100 * interval['value']:.0f}%, {low} to {high}"
