"""AlpacaEval (Dubois et al. 2024, arXiv:2404.04475): outputs, verdicts, win rate in its formats.

A preference is 1 where the baseline (output_1) wins, 2 where the model (output_2) does, 0 or 1.5
for a draw, and 1 + the probability that the model wins where the annotator weighs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from zephyr_jax.data.raw.schema import Row
from zephyr_jax.evaluation import answers
from zephyr_jax.evaluation.answers import FACTS, Answering
from zephyr_jax.evaluation.endpoints import Reply
from zephyr_jax.evaluation.evaluate import intervals, mean_of, metric_table

_UNIQUE = ("instruction",)
_IDENTITY = ("instruction", "output_1", "output_2", "annotator")  # of an annotation
_OFFICIAL = 805  # instructions
OUTPUT = {"instruction": str, "output": str, "generator": str}
ANNOTATION = {"instruction": str, "output_1": str, "output_2": str, "preference": object}
ANNOTATION |= {"generator_1?": str, "generator_2?": str, "annotator?": str}
_PROMPT = """Two assistants answered the instruction below. Which answer would most people prefer? \
Judge whether it is correct, complete, clear and to the point; neither the order of the answers \
nor their length counts by itself.

# Instruction
{instruction}

# Answer A
{first}

# Answer B
{second}

Reply with one letter and nothing else: A if answer A is better, B if answer B is."""


def run(args: argparse.Namespace) -> tuple[str, Any]:
    """Writes outputs or annotations, or gives the win rate in a line and a dict, by the flags."""
    answers.check_flags(args, "annotations", "baseline")
    failed: dict[str, int] = {}
    if args.model:
        questions = answers.read_rows(args.questions, {"instruction": str}, _UNIQUE)[: args.limit]
        answers.write_answers(args, functools.partial(_outputs, questions))
        if not args.judge:
            return "", None
    if args.judge:
        failed = _annotate(args)
    rows = answers.read_rows(args.annotations, ANNOTATION, _UNIQUE)
    result = win_rate(rows)
    result["numbers"] |= length_controlled(rows)
    text = (
        f"{result['model']} against {result['baseline']} by {result['annotator']}: "
        f"{result['win_rate']:.2f} +- {result['standard_error']:.2f}% of {result['n_total']}, "
        f"{result['n_without_preference']} without a preference, {sum(failed.values())} failed\n"
    )
    text += metric_table(result["numbers"]) + "\n"
    return text, {**result, "failed_requests": failed}


def _outputs(questions: Sequence[Row], answering: Answering) -> list[Row]:
    chats = [[{"role": "user", "content": row["instruction"]}] for row in questions]
    return [
        {"dataset": row.get("dataset", ""), "instruction": row["instruction"]}
        | {"output": reply, "generator": answering.name, **answering.facts()}
        for row, reply in zip(questions, answering.replies(chats), strict=True)
    ]


def _annotate(args: argparse.Namespace) -> dict[str, int]:
    """Writes the judge's preferences, null for an odd reply; returns how many requests failed."""
    both = (answers.read_rows(x, OUTPUT, _UNIQUE) for x in (args.answers, args.baseline))
    pairs = _pair_outputs(*both)[: args.limit]
    requests = []
    for pair in pairs:
        # Which answer is shown first depends on the instruction alone.
        swap = hashlib.sha256(pair["instruction"].encode()).digest()[0] % 2 == 1
        pair |= {"annotator": f"zephyr_jax_{args.judge}", "is_switched_outputs": swap}
        first, second = pair["output_1"], pair["output_2"]
        first, second = (second, first) if swap else (first, second)
        text = _PROMPT.format(instruction=pair["instruction"], first=first, second=second)
        requests.append([{"role": "user", "content": text}])
    if args.annotations.exists():
        there = answers.read_rows(args.annotations, ANNOTATION)
        wanted = {tuple(map(pair.get, _IDENTITY)) for pair in pairs}
        if {tuple(map(row.get, _IDENTITY)) for row in there} - wanted:
            problem = "holds annotations of other outputs, or another judge's; name another file"
            raise ValueError(f"{args.annotations} {problem}")
    one_token = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    replies, failed = answers.ask_judge(args, args.annotations, requests, **one_token)
    rows = []
    for pair, reply in zip(pairs, replies, strict=True):
        if reply is None:
            continue
        better = _share_of_b(reply)
        if better is not None:
            better = 1 + (1 - better if pair["is_switched_outputs"] else better)
        rows.append({**pair, "preference": better, "raw_completion": reply.text})
    if rows:
        answers.write_rows(args.annotations, rows)
    return failed


def _pair_outputs(outputs: Sequence[Row], baseline: Sequence[Row]) -> list[Row]:
    """The model's outputs next to the baseline's to the same; a ValueError if that lacks one."""
    theirs = {row["instruction"]: row for row in baseline}
    absent = [row["instruction"] for row in outputs if row["instruction"] not in theirs]
    if absent:
        raise ValueError(f"the baseline lacks {len(absent)} instructions: {absent[0]!r:.80}, ...")
    both = [(theirs[row["instruction"]], row) for row in outputs]
    return [
        {"instruction": row["instruction"], "dataset": row.get("dataset", "")}
        | {"output_1": other["output"], "generator_1": other["generator"]}
        | {"output_2": row["output"], "generator_2": row["generator"]}
        | {name: row[name] for name in FACTS if name in row}
        for other, row in both
    ]


def _share_of_b(reply: Reply) -> float | None:
    """The probability of B among A and B, 0 or 1 without log-probs; None if it is neither."""
    verdict = reply.text.strip(" \t\n.,:*()[]\"'")
    if verdict not in ("A", "B"):
        return None
    weights = {"A": 0.0, "B": 0.0}
    for token, logprob in reply.logprobs.items():
        if token.strip() in weights:
            weights[token.strip()] += math.exp(logprob)
    total = sum(weights.values())
    return weights["B"] / total if total else float(verdict == "B")


def win_rate(annotations: Sequence[Row]) -> dict[str, Any]:
    """The win rate of output_2 in percent, draws as half, its standard error, and counts."""
    values, judged = [], []
    for i, row in enumerate(annotations, 1):
        value = row["preference"]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not (value == 0 or 1 <= value <= 2):
            raise ValueError(f"annotation {i} has preference {value!r}; it must be 0 or 1 to 2")
        values.append(0.5 if value == 0 else value - 1)
        judged.append(row)
    if not values:
        raise ValueError(f"none of {len(annotations)} annotations has a preference")
    wins = np.asarray(values, np.float64)
    error = wins.std(ddof=1) / math.sqrt(len(wins)) if len(wins) > 1 else math.nan
    names = {row.get("generator_2", "") for row in annotations}
    if len(names) > 1:
        raise ValueError(f"annotations are of several models ({', '.join(sorted(names)[:3])})")
    return {
        "kind": "alpaca-eval",
        "model": names.pop(),
        "baseline": ", ".join(sorted({row.get("generator_1", "") for row in annotations})),
        "annotator": ", ".join(sorted({row.get("annotator", "") for row in annotations})),
        "win_rate": float(wins.mean()) * 100,
        "standard_error": float(error) * 100,
        "numbers": intervals({"win_rate": mean_of(100 * wins)}),
        "n_total": len(wins),
        "n_wins": int((wins > 0.5).sum()),
        "n_wins_base": int((wins < 0.5).sum()),
        "n_draws": int((wins == 0.5).sum()),
        "n_without_preference": len(annotations) - len(wins),
        "avg_length": float(np.mean([len(row["output_2"]) for row in annotations])),
        **_first_shown(judged, values),
        **{name: annotations[0][name] for name in FACTS if name in annotations[0]},
    }


def _first_shown(judged: Sequence[Row], values: Sequence[float]) -> dict[str, float]:
    """How often the answer that was shown first won, of decided annotations that tell the order."""
    wins = [
        (value > 0.5) == row["is_switched_outputs"]
        for row, value in zip(judged, values, strict=True)
        if value != 0.5 and "is_switched_outputs" in row
    ]
    n, first = len(wins), sum(wins)
    if n >= 20 and min(first, n - first) < n / 10:
        logging.warning("the judge prefers a place: the first answer wins %d of %d", first, n)
    return {"first_shown_wins": first / n} if n else {}


def length_controlled(annotations: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The package alpaca_eval's length-controlled rate of all its own annotations, in order."""
    baselines = {row.get("generator_1") for row in annotations}
    if len(annotations) != _OFFICIAL or baselines != {"gpt4_1106_preview"}:
        return {}
    try:
        metrics = importlib.import_module("alpaca_eval.metrics")
        result = metrics.get_length_controlled_winrate(list(annotations), save_weights_dir=None)
    except (ModuleNotFoundError, OSError) as error:
        need = "it needs `pip install alpaca-eval` and the hub"
        logging.warning("no length-controlled win rate: %s (%s)", need, error)
        return {}
    value, error = map(float, (result["length_controlled_winrate"], result["lc_standard_error"]))
    ends = {"low": value - 1.96 * error, "high": value + 1.96 * error}
    return {"length_controlled_winrate": {"value": value, **ends}}
