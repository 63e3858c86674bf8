"""What a judge is worth: its agreement, its consistency, and its biases, with intervals.

Shares are over pairs of answers to one prompt (but for `ties`, those that the judge rates
differently). An interval holds 95% of bootstrap samples over prompts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.evaluation.evaluate import Interval, Ratio, intervals
from zephyr_jax.feedback.collect import JUDGEMENTS, ROWS
from zephyr_jax.feedback.forms import NOT_RATED
from zephyr_jax.feedback.judges import rating_of, recorded_ratings

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


def judge_quality(folder: Path, recorded: str = "", samples: int = 1000) -> dict[str, Any]:
    """The measures of a collected round's judge by form, and sentences on what is wrong with it.

    `recorded` is a file of rated rows, such as UltraFeedback's, against which it is held.

    Raises:
        FileNotFoundError: if the folder holds no round.
        ValueError: if its judge was not asked, so that there is nothing to measure.
    """
    path = folder / JUDGEMENTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {JUDGEMENTS}; collect a round there first")
    judgements = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if not judgements and not recorded:
        raise ValueError(
            f"the judge of {folder} was not asked, so it has no order and no repeats; name "
            "recorded ratings to hold its scores against"
        )
    truth = _truth(folder, recorded) if recorded else {}
    forms = list(dict.fromkeys(each["form"] for each in judgements))
    out: dict[str, Any] = {"forms": {}, "unreadable": 0, "judgements": len(judgements)}
    out["unreadable"] = sum(each["ratings"] is None for each in judgements)
    for form in forms:
        own = [each for each in judgements if each["form"] == form and each["ratings"]]
        out["forms"][form] = _measures(own, truth, form, samples)
    out["findings"] = findings(out["forms"])
    out["measures"] = MEASURES
    return out


def _truth(folder: Path, recorded: str) -> dict[tuple[str, str, str], float]:
    """(prompt id, contestant, form) -> recorded rating of the answer."""
    known, truth = recorded_ratings(recorded), {}
    for line in (folder / ROWS).read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt_id = prompt_digest(row["instruction"])
        for completion in row["completions"]:
            rated = known.get((prompt_id, completion["response"]), {})
            for form in ("overall", *(rated.get("annotations") or {})):
                value = rating_of(rated, form)
                if value is not None:
                    truth[prompt_id, completion["model"], form] = value
    return truth


def _number(rating: str) -> float:
    return np.nan if rating == NOT_RATED else float(rating)


def _measures(
    judgements: Sequence[Mapping[str, Any]], truth: Mapping[Any, float], form: str, samples: int
) -> dict[str, Any]:
    """The measures of one form: name -> value, low, high, and n, the pairs behind it."""
    cases = {name: list[tuple[str, float]]() for name in MEASURES}
    levels: list[tuple[float, float]] = []
    earlier: dict[Any, float] = {}
    for each in judgements:
        prompt, ratings = each["prompt_id"], [_number(rating) for rating in each["ratings"]]
        recorded = [truth.get((prompt, name, form), np.nan) for name in each["contestants"]]
        levels += [x for x in zip(ratings, recorded, strict=True) if not np.isnan(x).any()]
        place = np.argsort(each["order"])
        for i, j in itertools.combinations(range(len(ratings)), 2):
            wins = np.sign(ratings[i] - ratings[j])
            if not np.isnan(wins):
                cases["ties"].append((prompt, wins == 0))
            if np.isnan(wins) or not wins:
                continue
            longer = np.sign(each["lengths"][i] - each["lengths"][j])
            better = np.sign(recorded[i] - recorded[j])
            cases["first_shown_wins"].append((prompt, wins == np.sign(place[j] - place[i])))
            if longer:
                cases["longer_wins"].append((prompt, wins == longer))
            if better in (-1, 1):
                cases["accuracy"].append((prompt, wins == better))
                if longer:
                    cases["longer_wins_as_recorded"].append((prompt, better == longer))
                    beyond = float(wins == longer) - float(better == longer)
                    cases["longer_wins_beyond_recorded"].append((prompt, beyond))
            pair = (prompt, i, j, each["repeat"] // 2)
            if pair in earlier:
                cases["self_agreement"].append((prompt, wins == earlier[pair]))
            earlier[pair] = wins
    out = {name: _interval(each, samples) for name, each in cases.items() if each}
    if len({a for a, _ in levels}) > 1 and len({b for _, b in levels}) > 1:
        rated, known = np.asarray(levels).T
        correlation: Any = stats.spearmanr(rated, known)
        out["spearman"] = {"value": float(correlation.statistic), "n": len(levels)}
    return out


def _interval(cases: Sequence[tuple[str, float]], samples: int) -> dict[str, float]:
    values = np.asarray([value for _, value in cases], float)
    clusters = np.asarray([prompt for prompt, _ in cases])
    ratio = Ratio(values, np.ones_like(values))
    drawn: Interval = intervals({"x": ratio}, clusters, samples=samples)["x"]
    return {**drawn._asdict(), "n": len(values)}


def findings(forms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the intervals prove to be wrong, a sentence each; nothing where they leave room."""
    out = []
    for form, measures in forms.items():
        if measures.get("ties", {}).get("value", 0.0) > _ALL_ALIKE:
            out.append(f"{form}: rates nearly every answer alike, so few pairs can be made")
        first, agreement = measures.get("first_shown_wins"), measures.get("self_agreement")
        if first and not first["low"] <= 0.5 <= first["high"]:
            side = "first" if first["value"] > 0.5 else "last"
            out.append(f"{form}: prefers what is shown {side} ({_shown(first)}; fair is 50%)")
        beyond, longer = measures.get("longer_wins_beyond_recorded"), measures.get("longer_wins")
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
        if agreement and agreement["low"] <= 0.5:
            out.append(f"{form}: contradicts itself as chance would ({_shown(agreement)} agree)")
        accuracy = measures.get("accuracy")
        if accuracy and accuracy["low"] <= 0.5:
            out.append(f"{form}: agrees with the record no better than chance ({_shown(accuracy)})")
    return out


def _shown(interval: Mapping[str, float]) -> str:
    low, high = (f"{100 * interval[name]:.0f}%" for name in ("low", "high"))
    return f"{100 * interval['value']:.0f}%, {low} to {high}"
