"""One round: prompts are answered, answers rated, and rows written as UltraFeedback has them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from zephyr_jax.evaluation.answers import write_rows
from zephyr_jax.evaluation.endpoints import CHARACTERS, Cache, Spending, cost
from zephyr_jax.feedback import answers
from zephyr_jax.feedback.config import SYSTEM_PROMPTS, FeedbackConfig
from zephyr_jax.feedback.judges import Rate, judge
from zephyr_jax.feedback.quality import JUDGEMENTS, ROWS, measures
from zephyr_jax.storage import lock, seal, write_atomic
from zephyr_jax.weights.sources import resolve

ACCOUNT, CACHE = "account.json", "cache.sqlite"
_SYSTEM, _FORM = 40, 250  # tokens of system prompts, in estimates
_UNRATED = {"annotations": {}, "critique": "", "overall_score": None, "fine-grained_score": None}


def collect(
    config: FeedbackConfig, folder: Path, spending: Spending, rate: Rate | None = None
) -> Path:
    """Runs the round, or what is missing of it, and returns the file of rows.

    `folder` also gets every judgement, an account and the cache; docs/feedback.md describes them.
    The judge of kind "function" is `rate`: prompt and answer to the answer's rating fields.
    CapReached if a limit of `spending` stopped it, a ValueError if something does not fit.
    """
    _check(config, spending, rate)
    contestants, recorded = config.contestants, {}
    for name, one in contestants.items():
        if one.answers:
            recorded[name] = answers.recorded_answers(one.answers, one.model or name)
    prompts, prompt_counts = answers.read_prompts(config.prompts, config.seed)
    asked = [name for name in contestants if name not in recorded]
    requests = {name: answers.answer_requests(config, name, prompts) for name in asked}
    held = contextlib.nullcontext() if jax.process_index() else lock(folder)
    with held, contextlib.closing(Cache(folder / CACHE)) as cache:
        both = {name: (contestants[name], own) for name, own in requests.items()}
        answers.ask(config, both, cache, spending)
        answered, counts = answers.answers_to(config, prompts, requests, recorded, cache)
        ratings, judgements, rated = judge(config, answered, cache, spending, rate)
        if not jax.process_index():
            for name, account in counts.items():
                _add_cost(account, config.contestants[name].price)
            _add_cost(rated, config.judge.price)
            rows = [_row(config, each, ratings[each.prompt.id]) for each in answered]
            write_rows(folder / JUDGEMENTS, judgements)
            write_rows(folder / ROWS, rows)
            account = {
                "name": config.name,
                "sealed": True,
                "rows": len(answered),
                "prompts": prompt_counts,
                "answers": counts,
                "judgements": rated,
                "agreement": measures(judgements, samples=200),
                "this_call": vars(spending),
                "config": dataclasses.asdict(config),
            }
            write_atomic(folder / ACCOUNT, json.dumps(account, indent=1, ensure_ascii=False))
            seal(folder, [JUDGEMENTS, ROWS, ACCOUNT])
    return folder / ROWS


def _check(config: FeedbackConfig, spending: Spending, rate: Rate | None) -> None:
    """Refuses, before anything is asked, what would end the round later."""
    for one in config.at_endpoints.values():
        config.endpoints[one.endpoint].key()
    unpriced = ", ".join(name for name, one in config.at_endpoints.items() if not one.price)
    if spending.max_cost and unpriced:
        raise ValueError(f"--max_cost needs the price of {unpriced}; (0, 0) where that is free")
    own = config.judge
    if own.kind in ("model", "implicit_reward"):
        resolve(own.model, weights=False)
    if own.kind == "recorded":
        answers.recorded_ratings(own.ratings)
    if own.kind == "function" and rate is None:
        raise ValueError("judge.kind=function is for Python: collect(..., rate=FUNCTION)")


def _add_cost(account: dict[str, Any], price: Sequence[float]) -> None:
    if price:
        account["cost"] = cost([account.get(f"tokens_{x}", 0) for x in ("in", "out")], price)


def _row(config: FeedbackConfig, each: answers.Answered, ratings: Sequence[Any]) -> dict[str, Any]:
    """A row in the raw UltraFeedback schema; docs/feedback.md names every field."""
    completions = []
    for name, text, rated in zip(each.contestants, each.texts, ratings, strict=True):
        principle = answers.draw_principle(config, each.prompt, name)
        words = SYSTEM_PROMPTS.get(principle, "")
        own = {"model": name, "principle": principle, "custom_system_prompt": words}
        completions.append({**_UNRATED, **rated, **own, "response": text})
    return {
        "source": each.prompt.source,
        "instruction": each.prompt.text,
        "models": each.contestants,
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "collected_by": "zephyr_jax",
    }


def estimate(config: FeedbackConfig) -> dict[str, Any]:
    """The most that a round asks of endpoints: requests, tokens and dollars, by asked model."""
    prompts, counts = answers.read_prompts(config.prompts, config.seed)
    n, texts = len(prompts), sum(len(prompt.text) for prompt in prompts) // CHARACTERS
    out: dict[str, Any] = {"prompts": counts}
    for name, one in config.at_endpoints.items():
        times, shown = 1, _SYSTEM
        if one is config.judge:
            times = len(config.judge.forms) * config.judge.repeats
            shown = _FORM + sum(each.max_tokens for each in config.contestants.values())
        tokens = times * (texts + n * shown), times * n * one.max_tokens
        out[name] = {"requests": times * n, "tokens_in": tokens[0], "tokens_out": tokens[1]}
        _add_cost(out[name], one.price)
    return out
