"""One round: prompts are answered, answers rated, and rows written as UltraFeedback has them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from zephyr_jax.feedback.answers import (
    SYSTEM_PROMPTS,
    Answered,
    answer_requests,
    answers_to,
    draw_principle,
)
from zephyr_jax.feedback.asking import Cache, Request, ask_endpoint, ask_here
from zephyr_jax.feedback.config import FeedbackConfig
from zephyr_jax.feedback.endpoints import Spending, open_endpoints
from zephyr_jax.feedback.judges import (
    Ratings,
    asked_ratings,
    implicit_rewards,
    judge_questions,
    recorded_ratings,
)
from zephyr_jax.feedback.prompts import read_prompts
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import write_atomic
from zephyr_jax.weights.checkpoint import Model

ROWS, JUDGEMENTS, ACCOUNT = "ultrafeedback.jsonl", "judgements.jsonl", "account.json"
CACHE = "cache.sqlite"
COLLECTOR = "zephyr_jax"  # in `collected_by` of every row
_CHARACTERS_A_TOKEN = 4  # in estimates before a round


def collect(config: FeedbackConfig, folder: Path, spending: Spending) -> Path:
    """Runs the round, or what is missing of it, and returns the file of rows.

    `folder` gets `ultrafeedback.jsonl` (rows for `prepare_data.py ultrafeedback`),
    `judgements.jsonl` (every rating with the order of the answers), `account.json`, and the cache.

    Raises:
        CapReached: if a limit of `spending` stopped it; what was answered is kept.
        ValueError: if a prompt source, an endpoint, a model or the folder does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, prompt_counts = read_prompts(config.prompts, config.seed)
    with _locked(folder), contextlib.closing(Cache(folder / CACHE)) as cache:
        requests = answer_requests(config, prompts)
        _ask_contestants_here(config, requests, cache)
        if not jax.process_index():
            asyncio.run(_ask_contestants(config, requests, cache, spending))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("answers")
        answered, answer_counts = answers_to(config, prompts, requests, cache)
        ratings, judgements, judge_counts = _judge(config, answered, cache, spending)
    if not jax.process_index():
        _write_lines(folder / JUDGEMENTS, judgements)
        rows = (_row(config, each, ratings[each.prompt.id]) for each in answered)
        _write_lines(folder / ROWS, rows)
        account = {
            "name": config.name,
            "rows": len(answered),
            "prompts": prompt_counts,
            "answers": answer_counts,
            "judgements": judge_counts,
            "this_call": dataclasses.asdict(spending),
            "config": dataclasses.asdict(config),
        }
        write_atomic(folder / ACCOUNT, json.dumps(account, indent=1, ensure_ascii=False))
    return folder / ROWS


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second call out of the folder; of several processes the first one does."""
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        with lock if not jax.process_index() else contextlib.nullcontext():
            yield
    except Timeout:
        raise ValueError(f"another process collects feedback in {folder}; wait for it") from None


def _ask_contestants_here(
    config: FeedbackConfig, requests: Mapping[str, Sequence[Request]], cache: Cache
) -> None:
    """Samples from the models here, each loaded once."""
    here = {k: one for k, one in config.contestants.items() if one.model and not one.endpoint}
    loaded: dict[str, Model] = {}
    for name, one in sorted(here.items(), key=lambda item: item[1].model):
        sampling = SamplingParams(
            max_new_tokens=one.max_tokens,
            temperature=one.temperature,
            top_p=one.top_p,
            seed=one.seed,
        )
        size = config.batch_size
        ask_here(one.model, loaded, requests[name], sampling, cache, size, name=name)


async def _ask_contestants(
    config: FeedbackConfig,
    requests: Mapping[str, Sequence[Request]],
    cache: Cache,
    spending: Spending,
) -> None:
    asked = {name: one for name, one in config.contestants.items() if one.endpoint}
    used = {one.endpoint: config.endpoints[one.endpoint] for one in asked.values()}
    async with open_endpoints(used, spending) as endpoints:
        for name, one in asked.items():
            await ask_endpoint(
                endpoints[one.endpoint],
                one.model,
                requests[name],
                cache,
                name=name,
                temperature=one.temperature,
                top_p=one.top_p,
                max_tokens=one.max_tokens,
                seed=one.seed,
            )


def _judge(
    config: FeedbackConfig, answered: Sequence[Answered], cache: Cache, spending: Spending
) -> tuple[Ratings, list[dict[str, Any]], dict[str, int]]:
    """Every answer's ratings, the judgements one by one, and counts."""
    judge = config.judge
    if judge.kind in ("implicit_reward", "recorded"):
        if judge.kind == "recorded":
            found = recorded_ratings(judge.ratings)
            ratings = {
                each.prompt.id: [found.get((each.prompt.id, text), {}) for text in each.texts]
                for each in answered
            }
        else:
            rewards = implicit_rewards(judge, answered)
            ratings = {k: [_rewarded(x) for x in values] for k, values in rewards.items()}
        counts = Counter("rated" if x else "not_rated" for xs in ratings.values() for x in xs)
        return ratings, [], dict(counts)
    questions = judge_questions(config, answered)
    requests = [question.request for question in questions]
    if judge.kind == "model":
        sampling = SamplingParams(max_new_tokens=judge.max_tokens, temperature=judge.temperature)
        size, attempts = config.batch_size, judge.attempts
        ask_here(judge.model, {}, requests, sampling, cache, size, attempts, "judge")
    elif not jax.process_index():
        asyncio.run(_ask_judge(config, requests, cache, spending))
    return asked_ratings(questions, answered, cache)


def _rewarded(reward: float) -> dict[str, Any]:
    return {"overall_score": reward} if math.isfinite(reward) else {}


async def _ask_judge(
    config: FeedbackConfig, requests: Sequence[Request], cache: Cache, spending: Spending
) -> None:
    judge, used = config.judge, {config.judge.endpoint: config.endpoints[config.judge.endpoint]}
    settings = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
    async with open_endpoints(used, spending) as endpoints:
        endpoint = endpoints[judge.endpoint]
        await ask_endpoint(
            endpoint, judge.model, requests, cache, judge.attempts, "judge", **settings
        )


def _row(config: FeedbackConfig, each: Answered, ratings: Sequence[Any]) -> dict[str, Any]:
    """A row in the raw UltraFeedback schema; docs/feedback.md names every field."""
    completions = []
    for name, text, rated in zip(each.contestants, each.texts, ratings, strict=True):
        principle = draw_principle(config, each.prompt, name)
        words = SYSTEM_PROMPTS.get(principle, "")
        own = {"model": name, "principle": principle, "custom_system_prompt": words}
        completions.append({**rated, **own, "response": text})
    return {
        "source": each.prompt.source,
        "instruction": each.prompt.text,
        "models": each.contestants,
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "collected_by": COLLECTOR,
    }


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def estimate(config: FeedbackConfig, folder: Path) -> dict[str, Any]:
    """What a round would still ask of its endpoints: requests, tokens and dollars, by asked model.

    A token is taken for four characters, and every reply for as long as it may be, so that the cost
    is more than it will be. Nothing is asked or written.
    """
    prompts, counts = read_prompts(config.prompts, config.seed)
    out: dict[str, Any] = {"prompts": counts}
    judge, n = config.judge, len(config.contestants)
    with contextlib.ExitStack() as stack:
        cache = None
        if (folder / CACHE).is_file():
            cache = stack.enter_context(contextlib.closing(Cache(folder / CACHE)))
        for name, requests in answer_requests(config, prompts).items():
            if (one := config.contestants[name]).endpoint:
                missing = [x for x in requests if not cache or cache.get(x.key) is None]
                texts = sum(len(turn["content"]) for x in missing for turn in x.messages)
                tokens = (texts // _CHARACTERS_A_TOKEN, len(missing) * one.max_tokens)
                price = config.endpoints[one.endpoint].prices.get(one.model)
                out[name] = _estimated(len(missing), tokens, price)
    if judge.kind == "endpoint":
        longest = sum(one.max_tokens for one in config.contestants.values())
        asked = len(prompts) * len(judge.forms) * judge.repeats
        question = sum(len(prompt.text) for prompt in prompts) // _CHARACTERS_A_TOKEN
        read = (question + len(prompts) * (longest + 60 * n)) * len(judge.forms) * judge.repeats
        price = config.endpoints[judge.endpoint].prices.get(judge.model)
        out["judge"] = _estimated(asked, (read, asked * judge.max_tokens), price)
    return out


def _estimated(requests: int, tokens: tuple[int, int], price: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"requests": requests, "tokens_in": tokens[0], "tokens_out": tokens[1]}
    if price is not None:
        out["cost"] = sum(n * p for n, p in zip(tokens, price, strict=True)) / 1e6
    return out
