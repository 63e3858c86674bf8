"""What a judge is worth: its agreement, its consistency, and its biases, with intervals."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import Row, prompt_digest
from zephyr_jax.evaluation.evaluate import intervals, mean_of
from zephyr_jax.feedback.answers import recorded_ratings
from zephyr_jax.feedback.judges import rating_of
from zephyr_jax.storage import verify

ROWS, JUDGEMENTS = "ultrafeedback.jsonl", "judgements.jsonl"
MEASURES = {
    "ties": "how often two answers are rated alike",
    "first_shown_wins": "how often the answer that is shown first wins",
    "longer_wins": "how often the longer answer wins, where nothing is recorded",
    "self_agreement": "how often a repeat in the reverse order prefers the same answer",
    "accuracy": "how often the answer with the higher recorded rating wins",
    "longer_wins_beyond_recorded": "how much more often the longer answer wins than by the record",
    "spearman": "rank correlation with the recorded ratings (Spearman)",
}
# Of a measure: what of its interval proves a fault, and the fault
_FAULTS = (
    ("ties", lambda x: x["value"] > 0.9, "rates nearly all alike, so few pairs come of it"),
    ("first_shown_wins", lambda x: x["low"] > 0.5, "prefers what is shown first; fair is 50%"),
    ("first_shown_wins", lambda x: x["high"] < 0.5, "prefers what is shown last; fair is 50%"),
    ("longer_wins", lambda x: x["low"] > 0.75, "prefers longer answers, which may be better"),
    ("longer_wins_beyond_recorded", lambda x: x["low"] > 0, "prefers longer answers; fair is 0%"),
    ("longer_wins_beyond_recorded", lambda x: x["high"] < 0, "prefers shorter answers; fair is 0%"),
    ("self_agreement", lambda x: x["low"] <= 0.5, "contradicts itself as chance would"),
    ("accuracy", lambda x: x["low"] <= 0.5, "agrees with the record no better than chance"),
)

Measures = dict[str, dict[str, float]]  # name -> value, low, high and n, the cases behind it


def judge_quality(
    folder: Path, recorded: str = "", samples: int = 1000
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The `forms` (measures of a collected round's judge by form) and `findings`; what to draw.

    `recorded` is a file of rated rows of the answers. A FileNotFoundError if the folder holds no
    round, a ValueError if nothing can be measured.
    """
    if not (folder / JUDGEMENTS).is_file():
        raise FileNotFoundError(f"{folder} holds no finished round: it has no {JUDGEMENTS}")
    verify(folder, required=False, remedy="run the round again, which asks nothing twice")
    files: Any = ([row for _, row in numbered_rows(folder / x)] for x in (JUDGEMENTS, ROWS))
    judgements, rows = files
    if recorded:
        known, answers = recorded_ratings(recorded), {}
        for row in rows:
            answers[prompt_digest(row["instruction"])] = [x["response"] for x in row["completions"]]
        for each in judgements:
            rated = [known.get((each["prompt_id"], x), {}) for x in answers[each["prompt_id"]]]
            each["recorded"] = [rating_of(completion, each["form"]) for completion in rated]
        if not any(rating is not None for each in judgements for rating in each["recorded"]):
            raise ValueError(f"{recorded} rates none of the answers of {folder}")
    forms = measures(judgements, samples)
    if not forms:
        raise ValueError(f"{folder} has no two ratings of answers to one prompt to compare")
    out: dict[str, Any] = {"forms": forms, "findings": findings(forms)}
    out["judgements"] = len(judgements)
    out["unreadable"] = sum(each["ratings"] is None for each in judgements)
    return out, {form: _drawn(own) for form, own in _by_form(judgements).items()}


def _by_form(judgements: Sequence[Row]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for each in judgements:
        groups[each["form"]] += [each] if each["ratings"] else []
    return {form: own for form, own in groups.items() if own}


def _numbers(judgement: Row, column: str = "ratings") -> np.ndarray:
    """One number for each answer, NaN where it has none."""
    return np.asarray(judgement.get(column) or [None] * len(judgement["ratings"]), float)


def _pairs(judgements: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts of `N` pairs of answers, and `5 N` numbers of the first answer less the other's.

    They are the rating, that of the judgement before in the reverse order, the recorded one, the
    place (above 0: shown first), and the characters.
    """
    rows: list[tuple[Any, ...]] = []
    earlier: dict[Any, float] = {}
    for each in judgements:
        order, lengths = each["order"], each["lengths"]
        place = -np.argsort(order) if order else np.zeros(len(lengths))
        values = np.stack([_numbers(each), _numbers(each, "recorded"), place, lengths])
        for i, j in itertools.combinations(range(len(lengths)), 2):
            rated, *others = values[:, i] - values[:, j]
            pair = each["prompt_id"], i, j, each["repeat"] // 2
            rows.append((rated, earlier.get(pair, np.nan), *others, each["prompt_id"]))
            earlier[pair] = rated
    *numbers, prompts = zip(*rows, strict=True) if rows else [()] * 6
    return np.asarray(prompts), np.asarray(numbers)


def measures(judgements: Sequence[Row], samples: int = 1000) -> dict[str, Measures]:
    """The measures of each form of which something can be measured."""
    out = {}
    for form, own in _by_form(judgements).items():
        prompts, differences = _pairs(own)
        rated, earlier, recorded, shown, longer = np.sign(differences)
        decided, known = np.abs(rated) == 1, np.abs(recorded) == 1
        unequal = decided & (longer != 0)
        excess = (rated == longer).astype(float) - (recorded == longer)
        cases = {
            "ties": (rated == 0, ~np.isnan(rated)),
            "first_shown_wins": (rated == shown, decided & (shown != 0)),
            "longer_wins": (rated == longer, unequal & ~known),
            "self_agreement": (rated == earlier, decided & (np.abs(earlier) == 1)),
            "accuracy": (rated == recorded, decided & known),
            "longer_wins_beyond_recorded": (excess, unequal & known),
        }
        found: Measures = {}
        for name, (values, counted) in cases.items():
            if counted.any():
                found[name] = _interval(values[counted], prompts[counted], samples)
        out[form] = found | _spearman(own, samples)
    return {form: found for form, found in out.items() if found}


def _interval(values: np.ndarray, prompts: np.ndarray, samples: int) -> dict[str, float]:
    return intervals({"x": mean_of(values)}, prompts, samples=samples)["x"] | {"n": len(values)}


def _spearman(judgements: Sequence[Row], samples: int) -> Measures:
    """The mean product of standardized ranks of ratings and record; {} where either is constant."""
    columns = [[_numbers(x, name) for x in judgements] for name in ("ratings", "recorded")]
    prompts = np.repeat([x["prompt_id"] for x in judgements], list(map(len, columns[0])))
    values = np.stack([np.concatenate(column) for column in columns])
    counted = ~np.isnan(values).any(axis=0)
    ranks = stats.rankdata(values[:, counted], axis=1)
    if not counted.any() or not np.ptp(ranks, axis=1).all():
        return {}
    deviations: Any = stats.zscore(ranks, axis=1)
    return {"spearman": _interval(deviations.prod(axis=0), prompts[counted], samples)}


def _drawn(judgements: Sequence[Row]) -> dict[str, np.ndarray]:
    rated, _, _, shown, longer = _pairs(judgements)[1]
    values = {
        "Ratings": np.concatenate([_numbers(each) for each in judgements]),
        "Shown first minus shown later": (rated * np.sign(shown))[shown != 0],
        "Longer minus shorter": (rated * np.sign(longer))[longer != 0],
    }
    return {title: each[~np.isnan(each)] for title, each in values.items()}


def findings(forms: Mapping[str, Measures]) -> list[str]:
    """What the intervals prove to be wrong, a sentence each; nothing where they leave room."""
    out = []
    for form, found in forms.items():
        for name, is_wrong, problem in _FAULTS:
            measured = found.get(name)
            if measured and is_wrong(measured):
                value, low, high = (f"{100 * measured[x]:.0f}%" for x in ("value", "low", "high"))
                out.append(f"{form}: {problem} ({value}, {low} to {high})")
    return out
