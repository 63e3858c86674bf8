"""Answers to the prompts: what contestants are asked, recorded answers, and what came of both."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash, prompt_digest
from zephyr_jax.feedback.asking import Cache, Request, content_key, model_identity
from zephyr_jax.feedback.config import FeedbackConfig
from zephyr_jax.feedback.prompts import Prompt, first_question

_ANSWERS = ("response", "reply", "output", "completion")
# Our own words for the principles of UltraFeedback (Cui et al. 2023, arXiv:2310.01377).
SYSTEM_PROMPTS = {
    "helpfulness": "Solve the task at hand: completely, correctly, in good order, and no longer "
    "than it needs.",
    "honesty": "Be honest about what you know. Where you are unsure or cannot know something, say "
    "so instead of sounding certain.",
    "truthfulness": "State only what is true. Invent no facts, sources or quotations, and correct "
    "a false assumption of the question before you answer it.",
    "verbalized_calibration": "Answer the question, and say in words or as a percentage how "
    "confident you are in each claim that could be wrong.",
}


class Answered(NamedTuple):
    """A prompt and the answers to it, in the order of the contestants."""

    prompt: Prompt
    contestants: list[str]
    texts: list[str]


def draw_principle(config: FeedbackConfig, prompt: Prompt, contestant: str) -> str:
    """The principle of an answer, drawn by the seed, the prompt and the contestant; "" for none."""
    if not config.principles or config.contestants[contestant].answers:
        return ""
    drawn = random.Random(keyed_hash("principle", config.seed, f"{prompt.id}/{contestant}"))
    return drawn.choices(list(config.principles), list(config.principles.values()))[0]


def answer_requests(config: FeedbackConfig, prompts: Sequence[Prompt]) -> dict[str, list[Request]]:
    """What each contestant that is asked is asked, in the order of the prompts."""
    requests = {}
    for name, contestant in config.contestants.items():
        if contestant.answers:
            continue
        here = not contestant.endpoint
        where = "" if here else config.endpoints[contestant.endpoint].url
        identity = model_identity(contestant.model) if here else where
        requests[name] = []
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt.text}]
            if principle := draw_principle(config, prompt, name):
                messages.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[principle]})
            key = content_key("answer", identity, dataclasses.asdict(contestant), messages)
            requests[name].append(Request(key, messages))
    return requests


def recorded_answers(path: str, contestant: str) -> dict[str, str]:
    """The answers in a jsonl file by the ids of their prompts; of several to one the first.

    A row has a prompt and one of `response`, `reply`, `output`, `completion`; of a row in the raw
    UltraFeedback schema the completion of the model that has the contestant's name counts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if no row has both.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"contestants.{contestant}.answers={path} is not a file")
    answers: dict[str, str] = {}
    for row in itertools.chain.from_iterable(map(read_rows, chunks_of(Path(path)))):
        question = first_question(row) if isinstance(row, dict) else None
        text = _answer_of(row, contestant) if isinstance(row, dict) else None
        if question is not None and text is not None:
            answers.setdefault(prompt_digest(question), text)
    if not answers:
        raise ValueError(
            f"{path} has no row with a prompt and one of {', '.join(_ANSWERS)}, nor one with a "
            f"completion of the model {contestant}"
        )
    return answers


def _answer_of(row: Row, contestant: str) -> str | None:
    completions = row.get("completions")
    if isinstance(completions, list):
        named = [one for one in completions if one.get("model") == contestant]
        return named[0].get("response") if named else None
    return next((row[name] for name in _ANSWERS if isinstance(row.get(name), str)), None)


def answers_to(
    config: FeedbackConfig,
    prompts: Sequence[Prompt],
    requests: Mapping[str, Sequence[Request]],
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
    counts = {name: Counter[str]() for name in config.contestants}
    answered = []
    for i, prompt in enumerate(prompts):
        each = Answered(prompt, [], [])
        for name in config.contestants:
            stored = cache.get(requests[name][i].key) if name in requests else None
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
