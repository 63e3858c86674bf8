"""One round: prompts are answered, answers rated, and rows written as UltraFeedback has them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.feedback.answers import (
    SYSTEM_PROMPTS,
    Job,
    answer_jobs,
    ask_endpoint,
    draw_principle,
    recorded_answers,
    sample_here,
)
from zephyr_jax.feedback.config import OVERALL, FeedbackConfig
from zephyr_jax.feedback.endpoints import Cache, Spending, open_endpoints
from zephyr_jax.feedback.forms import FORMS, NOT_RATED, Rating
from zephyr_jax.feedback.judges import (
    Answered,
    Question,
    implicit_rewards,
    judge_at_endpoint,
    judge_here,
    judge_questions,
    recorded_ratings,
)
from zephyr_jax.feedback.prompts import Prompt, read_prompts
from zephyr_jax.storage import write_atomic

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
        jobs = answer_jobs(config, prompts)
        sample_here(config, jobs, cache)
        asyncio.run(_ask_contestants(config, jobs, cache, spending))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("answers")
        answered, answer_counts = answers_to(config, prompts, jobs, cache)
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


async def _ask_contestants(
    config: FeedbackConfig, jobs: Mapping[str, Sequence[Job]], cache: Cache, spending: Spending
) -> None:
    asked = {name: one for name, one in config.contestants.items() if one.endpoint}
    if not asked or jax.process_index():
        return
    used = {one.endpoint: config.endpoints[one.endpoint] for one in asked.values()}
    async with open_endpoints(used, spending) as endpoints:
        for name, one in asked.items():
            with _bar(name, "answer", jobs[name], cache, spending) as advance:
                await ask_endpoint(one, endpoints[one.endpoint], jobs[name], cache, advance)


@contextlib.contextmanager
def _bar(
    name: str, unit: str, asked: Sequence[Any], cache: Cache, spending: Spending
) -> Iterator[Callable[[], None]]:
    """A progress bar with what was spent, which begins where an earlier call stopped."""
    done = sum(cache.get(one.key) is not None for one in asked)
    with tqdm(total=len(asked), initial=done, desc=name, unit=unit) as bar:

        def advance() -> None:
            bar.set_postfix_str(str(spending), refresh=False)
            bar.update()

        yield advance


def answers_to(
    config: FeedbackConfig,
    prompts: Sequence[Prompt],
    jobs: Mapping[str, Sequence[Job]],
    cache: Cache,
) -> tuple[list[Answered], dict[str, dict[str, int]]]:
    """The prompts with at least one answer and their answers, and counts by contestant.

    Left out and counted: `missing` answers, `refused` and `empty` ones, and prompts that are
    `too_long` for the model.
    """
    recorded = {
        name: recorded_answers(one.answers, name)
        for name, one in config.contestants.items()
        if one.answers
    }
    counts = {name: Counter[str]() for name in jobs}
    answered = []
    for i, prompt in enumerate(prompts):
        each = Answered(prompt, [], [])
        for name in jobs:
            stored = cache.get(jobs[name][i].key) if name not in recorded else None
            text = stored["text"] if stored else recorded.get(name, {}).get(prompt.id)
            finish = stored["finish"] if stored else ""
            if text is None or finish in ("refused", "too_long") or not text.strip():
                kind = finish if finish in ("refused", "too_long") else "empty"
                counts[name]["missing" if text is None else kind] += 1
                continue
            counts[name]["answered"] += 1
            if finish == "length":
                counts[name]["cut_at_max_tokens"] += 1
            each.contestants.append(name)
            each.texts.append(text)
        if each.texts:
            answered.append(each)
    if not answered:
        raise ValueError(f"no prompt has an answer: { ({k: dict(v) for k, v in counts.items()}) }")
    return answered, {name: dict(count) for name, count in counts.items()}


Ratings = dict[str, list[dict[str, Any]]]  # prompt id -> the rating fields of each answer


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
    if judge.kind == "model":
        judge_here(config, questions, cache)
    elif not jax.process_index():
        asyncio.run(_ask_judge(config, questions, cache, spending))
    return _asked_ratings(questions, answered, cache)


def _rewarded(reward: float) -> dict[str, Any]:
    return {"overall_score": reward} if math.isfinite(reward) else {}


async def _ask_judge(
    config: FeedbackConfig, questions: Sequence[Question], cache: Cache, spending: Spending
) -> None:
    judge, used = config.judge, {config.judge.endpoint: config.endpoints[config.judge.endpoint]}
    async with open_endpoints(used, spending) as endpoints:
        with _bar("judge", "rating", questions, cache, spending) as advance:
            await judge_at_endpoint(judge, endpoints[judge.endpoint], questions, cache, advance)


def _asked_ratings(
    questions: Sequence[Question], answered: Sequence[Answered], cache: Cache
) -> tuple[Ratings, list[dict[str, Any]], dict[str, int]]:
    said: dict[str, list[dict[str, list[Rating]]]] = {
        each.prompt.id: [{} for _ in each.texts] for each in answered
    }
    counts: Counter[str] = Counter()
    judgements: list[dict[str, Any]] = []
    for question in questions:
        stored = cache.get(question.key)
        values: list[Any] | None = stored["ratings"] if stored else None
        for answer, value in zip(said[question.answered.prompt.id], values or (), strict=False):
            answer.setdefault(question.form, []).append(Rating(*value))
        counts["missing" if stored is None else "rated" if values else "unreadable"] += 1
        counts["asked_again"] += max(0, stored["attempts"] - 1) if stored else 0
        counts["not_applicable"] += sum(value[0] == NOT_RATED for value in values or ())
        judgement = {
            "prompt_id": question.answered.prompt.id,
            "form": question.form,
            "repeat": question.repeat,
            "order": question.order,
            "contestants": question.answered.contestants,
            "lengths": [len(text) for text in question.answered.texts],
            "ratings": values and [value[0] for value in values],
        }
        judgements.append(judgement)
    ratings = {key: list(map(_completion, answers)) for key, answers in said.items()}
    return ratings, judgements, dict(counts)


def _completion(said: Mapping[str, Sequence[Rating]]) -> dict[str, Any]:
    """The rating fields of a completion: means over the repeats, the words of the first."""
    annotations, numbers = {}, []
    for form, ratings in said.items():
        if form == OVERALL:
            continue
        value = _mean(ratings)
        numbers += [] if value is None else [value]
        annotation: dict[str, Any] = {
            "Rating": NOT_RATED if value is None else str(math.floor(value + 0.5)),
            "Rationale": ratings[0].rationale,
        }
        if FORMS[form].types:
            annotation |= {"Type": ratings[0].types or ["None"], "Rationale For Rating": ""}
        annotations[form] = annotation
    overall = said.get(OVERALL, ())
    return {
        "annotations": annotations,
        "critique": overall[0].rationale if overall else "",
        "overall_score": _mean(overall),
        "fine-grained_score": sum(numbers) / len(numbers) if numbers else None,
    }


def _mean(ratings: Sequence[Rating]) -> float | None:
    numbers = [float(each.rating) for each in ratings if each.rating != NOT_RATED]
    return sum(numbers) / len(numbers) if numbers else None


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
        jobs = answer_jobs(config, prompts)
        for name, one in config.contestants.items():
            if one.endpoint:
                missing = [job for job in jobs[name] if not cache or cache.get(job.key) is None]
                texts = sum(len(turn["content"]) for job in missing for turn in job.messages)
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
