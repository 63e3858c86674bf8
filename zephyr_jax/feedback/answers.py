"""Answers to the prompts: sampled from models here, asked of endpoints, or looked up in files."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash, prompt_digest
from zephyr_jax.feedback.config import ContestantConfig, FeedbackConfig
from zephyr_jax.feedback.endpoints import Cache, Endpoint, content_key, model_identity
from zephyr_jax.feedback.prompts import Prompt, first_question
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.weights.checkpoint import Model
from zephyr_jax.weights.sources import load_model

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


class Job(NamedTuple):
    """One answer that is wanted."""

    prompt: Prompt
    contestant: str
    principle: str  # "" for none
    key: str  # of the cache

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the contestant reads."""
        user = {"role": "user", "content": self.prompt.text}
        if not self.principle:
            return [user]
        return [{"role": "system", "content": SYSTEM_PROMPTS[self.principle]}, user]


def draw_principle(config: FeedbackConfig, prompt: Prompt, contestant: str) -> str:
    """The principle of an answer, drawn by the seed, the prompt and the contestant; "" for none."""
    if not config.principles or config.contestants[contestant].answers:
        return ""
    drawn = random.Random(keyed_hash("principle", config.seed, f"{prompt.id}/{contestant}"))
    return drawn.choices(list(config.principles), list(config.principles.values()))[0]


def answer_jobs(config: FeedbackConfig, prompts: Sequence[Prompt]) -> dict[str, list[Job]]:
    """The answers that are wanted of each contestant, in the order of the prompts."""
    jobs = {}
    for name, contestant in config.contestants.items():
        if contestant.answers:
            jobs[name] = [Job(prompt, name, "", "") for prompt in prompts]
            continue
        here = not contestant.endpoint
        where = "" if here else config.endpoints[contestant.endpoint].url
        identity = model_identity(contestant.model) if here else where
        what = ["answer", identity, dataclasses.asdict(contestant)]
        drawn = [draw_principle(config, prompt, name) for prompt in prompts]
        jobs[name] = [
            Job(prompt, name, principle, content_key(what, prompt.id, principle))
            for prompt, principle in zip(prompts, drawn, strict=True)
        ]
    return jobs


def sample_here(config: FeedbackConfig, jobs: Mapping[str, Sequence[Job]], cache: Cache) -> None:
    """Samples the missing answers of the models here, each loaded once.

    Batches have prompts of about one length, and are the same whatever is missing, so that a round
    that was stopped ends with the answers of one that was not. All processes of a mesh compute each
    batch together, every device its rows; the first process stores it.
    """
    contestants = config.contestants.items()
    here = {name: one for name, one in contestants if one.model and not one.endpoint}
    source, model = "", None
    for name, contestant in sorted(here.items(), key=lambda item: item[1].model):
        missing = _missing_on_first_process(jobs[name], cache)
        if not missing:
            continue
        if model is None or source != contestant.model:
            model = None  # the earlier one is freed first
            source, model = contestant.model, load_model(contestant.model)
        with tqdm(total=len(jobs[name]), desc=name, unit="answer") as bar:
            _sample(contestant, model, jobs[name], missing, cache, config.batch_size, bar)


def _sample(
    contestant: ContestantConfig,
    model: Model,
    jobs: Sequence[Job],
    missing: set[str],
    cache: Cache,
    batch_size: int,
    bar: tqdm,
) -> None:
    rows = [prompt_ids(model.tokenizer, job.messages) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda i: (len(rows[i]), i))
    sampling = SamplingParams(
        max_new_tokens=contestant.max_tokens,
        temperature=contestant.temperature,
        top_p=contestant.top_p,
        seed=contestant.seed,
    )
    weights = (model.cfg, model.params, model.tokenizer)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        fitting = [i for i in batch if len(rows[i]) < model.cfg.max_position_embeddings]
        if any(jobs[i].key in missing for i in batch):
            replies = {i: {"text": "", "finish": "too_long"} for i in batch}
            if fitting:
                prompts = [rows[i] for i in fitting]
                texts = generate(*weights, prompts, sampling, first_row=start)
                answered = [{"text": text, "finish": "stop"} for text in texts]
                replies |= dict(zip(fitting, answered, strict=True))
            for i, reply in replies.items() if not jax.process_index() else ():
                cache.put(jobs[i].key, reply)
        bar.update(len(batch))


def _missing_on_first_process(jobs: Sequence[Job], cache: Cache) -> set[str]:
    """The keys that the first process lacks, whose cache counts."""
    lacks = [int(cache.get(job.key) is None) for job in jobs]
    if jax.process_count() > 1:
        lacks = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(lacks))).tolist()
    return {job.key for job, missing in zip(jobs, lacks, strict=True) if missing}


async def ask_endpoint(
    contestant: ContestantConfig,
    endpoint: Endpoint,
    jobs: Sequence[Job],
    cache: Cache,
    progress: Callable[[], None],
) -> None:
    """Asks an endpoint for the missing answers; each is stored as it comes."""

    async def one(job: Job) -> None:
        reply = await endpoint.chat(
            contestant.model,
            job.messages,
            temperature=contestant.temperature,
            top_p=contestant.top_p,
            max_tokens=contestant.max_tokens,
            seed=contestant.seed,
        )
        if reply is not None:
            cache.put(job.key, {"text": reply.text, "finish": reply.finish})
        progress()

    missing = (job for job in jobs if cache.get(job.key) is None)
    await in_parallel(missing, one, endpoint.config.concurrency)


async def in_parallel(items: Iterator[Any], work: Any, workers: int) -> None:
    """Does `await work(item)` for all items, `workers` at once.

    After an error no further item is begun, those in flight are finished, and the error is raised.
    """
    errors: list[Exception] = []

    async def take() -> None:
        for item in items:
            if errors:
                return
            try:
                await work(item)
            except Exception as error:  # whatever it is: what the others paid for is kept first
                errors.append(error)

    await asyncio.gather(*(take() for _ in range(workers)))
    if errors:
        raise errors[0]


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
