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
from typing import Any

import numpy as np
from scipy import stats

from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.evaluation.evaluate import intervals, mean_of
from zephyr_jax.feedback.config import ASPECTS, OVERALL
from zephyr_jax.feedback.judges import NOT_RATED, rating_of, recorded_ratings

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
_FAIR = 1 / 2


def judge_quality(folder: Path, recorded: str = "", samples: int = 1000) -> dict[str, Any]:
    """The measures of a collected round's judge by form, and sentences on what is wrong with it.

    `recorded` is a file of rated rows, such as UltraFeedback's, against which it is held. Of a
    judge that was not asked, its scores are.

    Raises:
        FileNotFoundError: if the folder holds no round.
        ValueError: if its judge was not asked, and nothing is recorded.
    """
    path, rows = folder / "judgements.jsonl", folder / "ultrafeedback.jsonl"
    if not path.is_file() or not rows.is_file():
        raise FileNotFoundError(f"{folder} holds no {path.name}; collect a round there first")
    judgements = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    scored = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    if not judgements and not recorded:
        raise ValueError(
            f"the judge of {folder} was not asked, so it has no order and no repeats; name "
            "recorded ratings to hold its scores against"
        )
    truth = _truth(scored, recorded) if recorded else {}
    forms = measures(judgements or _unasked(scored), truth, samples)
    unreadable = sum(each["ratings"] is None for each in judgements)
    counts = {"judgements": len(judgements), "unreadable": unreadable}
    return {"forms": forms, **counts, "findings": findings(forms), "measures": MEASURES}


def _unasked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of rows as judgements, without an order."""
    return [
        {
            "prompt_id": prompt_digest(row["instruction"]),
            "form": form,
            "repeat": 0,
            "order": None,
            "contestants": [x["model"] for x in row["completions"]],
            "lengths": [len(x["response"]) for x in row["completions"]],
            "ratings": [
                NOT_RATED if value is None else value
                for value in (rating_of(x, form) for x in row["completions"])
            ],
        }
        for row in rows
        for form in (OVERALL, *ASPECTS)
    ]


def _truth(rows: Sequence[Mapping[str, Any]], recorded: str) -> dict[tuple[str, str, str], float]:
    """(prompt id, contestant, form) -> recorded rating of the answer."""
    known, truth = recorded_ratings(recorded), {}
    for row, form in itertools.product(rows, (OVERALL, *ASPECTS)):
        prompt_id = prompt_digest(row["instruction"])
        for completion in row["completions"]:
            rated = known.get((prompt_id, completion["response"]), {})
            if (value := rating_of(rated, form)) is not None:
                truth[prompt_id, completion["model"], form] = value
    if not truth:
        raise ValueError(f"{recorded} rates none of the round's answers")
    return truth


def measures(
    judgements: Sequence[Mapping[str, Any]],
    truth: Mapping[tuple[str, str, str], float] | None = None,
    samples: int = 1000,
) -> dict[str, dict[str, dict[str, float]]]:
    """The measures of each form: name -> value, low, high, and n, the cases behind it."""
    by_form = defaultdict(list)
    for each in judgements:
        by_form[each["form"]] += [each] if each["ratings"] else []
    found = {form: _measures(own, truth or {}, samples) for form, own in by_form.items()}
    return {form: own for form, own in found.items() if own}


def _measures(
    judgements: Sequence[Mapping[str, Any]], truth: Mapping[Any, float], samples: int
) -> dict[str, dict[str, float]]:
    cases = {name: list[tuple[str, float]]() for name in MEASURES}
    levels: list[tuple[str, float, float]] = []
    earlier: dict[Any, float] = {}
    for each in judgements:
        prompt = each["prompt_id"]
        ratings = [np.nan if x == NOT_RATED else float(x) for x in each["ratings"]]
        keys = [(prompt, name, each["form"]) for name in each["contestants"]]
        recorded = [truth.get(key, np.nan) for key in keys]
        both = zip(ratings, recorded, strict=True)
        levels += [(prompt, *x) for x in both if not np.isnan(x).any()]
        place = each["order"] and np.argsort(each["order"])
        for i, j in itertools.combinations(range(len(ratings)), 2):
            wins = np.sign(ratings[i] - ratings[j])
            if not np.isnan(wins):
                cases["ties"].append((prompt, wins == 0))
            if np.isnan(wins) or not wins:
                continue
            longer = np.sign(each["lengths"][i] - each["lengths"][j])
            better = np.sign(recorded[i] - recorded[j])
            if place is not None:
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
    out = {}
    for name, own in cases.items():
        if own:
            clusters, values = zip(*own, strict=True)
            ratio = {"x": mean_of(np.asarray(values, float))}
            drawn = intervals(ratio, np.asarray(clusters), samples=samples)["x"]
            out[name] = {**drawn._asdict(), "n": len(own)}
    return out | _spearman(levels, samples)


def _spearman(
    levels: Sequence[tuple[str, float, float]], samples: int
) -> dict[str, dict[str, float]]:
    """The correlation of ratings with the record, bootstrapped over prompts; {} without any."""
    by_prompt = defaultdict(list)
    for prompt, *values in levels:
        by_prompt[prompt].append(values)
    groups, rng = [np.asarray(x) for x in by_prompt.values()], np.random.default_rng(0)
    if not levels or min(len(set(column)) for column in np.concatenate(groups).T) < 2:
        return {}
    ranks = stats.rankdata(np.concatenate(groups), axis=0)  # of all answers, as their proxy below
    parts = np.split(ranks, np.cumsum([len(x) for x in groups])[:-1])
    drawn = []
    for _ in range(samples):
        rows = np.concatenate([parts[i] for i in rng.integers(0, len(parts), len(parts))])
        drawn.append(stats.spearmanr(*rows.T).statistic)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    value = stats.spearmanr(*ranks.T).statistic
    return {"spearman": {"value": value, "low": low, "high": high, "n": len(ranks)}}


def findings(forms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the intervals prove to be wrong, a sentence each; nothing where they leave room."""
    out = []
    for form, measured in forms.items():
        if measured.get("ties", {}).get("value", 0.0) > _ALL_ALIKE:
            out.append(f"{form}: rates nearly every answer alike, so few pairs can be made")
        first, agreement = measured.get("first_shown_wins"), measured.get("self_agreement")
        if first and not first["low"] <= _FAIR <= first["high"]:
            side = "first" if first["value"] > _FAIR else "last"
            out.append(f"{form}: prefers what is shown {side} ({_shown(first)}; fair is 50%)")
        beyond, longer = measured.get("longer_wins_beyond_recorded"), measured.get("longer_wins")
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
        if agreement and agreement["low"] <= _FAIR:
            out.append(f"{form}: contradicts itself as chance would ({_shown(agreement)} agree)")
        accuracy = measured.get("accuracy")
        if accuracy and accuracy["low"] <= _FAIR:
            out.append(f"{form}: agrees with the record no better than chance ({_shown(accuracy)})")
    return out


def _shown(interval: Mapping[str, float]) -> str:
    low, high = (f"{100 * interval[name]:.0f}%" for name in ("low", "high"))
    return f"{100 * interval['value']:.0f}%, {low} to {high}"
