"""Judges: asked at an endpoint or here, or without any question by reward or by record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.raw.binarize import finite
from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, prompt_digest
from zephyr_jax.evaluation.scoring import RecordSet, pack_records, score
from zephyr_jax.feedback.answers import in_parallel
from zephyr_jax.feedback.config import OVERALL, FeedbackConfig, JudgeConfig
from zephyr_jax.feedback.endpoints import Cache, Endpoint, content_key, model_identity
from zephyr_jax.feedback.forms import (
    FORMS,
    Rating,
    judge_messages,
    read_ratings,
    schema_of,
    shown_order,
)
from zephyr_jax.feedback.prompts import Prompt
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.weights.sources import load_model

_AGAIN = "That could not be read. Rate every answer, in exactly the form that was asked for."
_CHAT = ChatConfig(True, False, False, False, "assistant", False)  # of a model that says none


class Answered(NamedTuple):
    """A prompt and the answers to it, in the order of the contestants."""

    prompt: Prompt
    contestants: list[str]
    texts: list[str]


class Question(NamedTuple):
    """One request to a judge: all answers to a prompt on one form."""

    answered: Answered
    form: str
    repeat: int
    order: list[int]  # entry k is the index of the answer that is shown as k + 1
    key: str  # of the cache

    def messages(self, *, as_json: bool) -> list[dict[str, str]]:
        """What the judge reads."""
        shown = [self.answered.texts[i] for i in self.order]
        return judge_messages(FORMS[self.form], self.answered.prompt.text, shown, as_json=as_json)

    def stored(self, ratings: list[Rating] | None, attempts: int) -> dict[str, Any]:
        """What the cache keeps: the ratings in the order of the contestants, None if unreadable."""
        ordered = None
        if ratings is not None:
            ordered = [ratings[self.order.index(i)] for i in range(len(self.order))]
        return {"ratings": ordered, "attempts": attempts}


def judge_questions(config: FeedbackConfig, answered: Sequence[Answered]) -> list[Question]:
    """Every request that a judge who is asked gets, in the order of the prompts."""
    judge = config.judge
    identity = model_identity(judge.model) if judge.kind == "model" else ""
    endpoint = config.endpoints[judge.endpoint].url if judge.endpoint else ""
    what = ["judgement", endpoint, judge.model, identity, judge.temperature, judge.max_tokens]
    questions = []
    for each in answered:
        for form, repeat in itertools.product(judge.forms, range(judge.repeats)):
            order = shown_order(config.seed, each.prompt.id, form, repeat, len(each.texts))
            asked = Question(each, form, repeat, order, "")
            key = content_key(what, repeat, asked.messages(as_json=True))
            questions.append(asked._replace(key=key))
    return questions


async def judge_at_endpoint(
    judge: JudgeConfig,
    endpoint: Endpoint,
    questions: Sequence[Question],
    cache: Cache,
    progress: Callable[[], None],
) -> None:
    """Asks an endpoint for the missing ratings; each is stored as it comes."""

    async def one(question: Question) -> None:
        form, n = FORMS[question.form], len(question.order)
        messages = question.messages(as_json=endpoint.config.json_schema)
        for attempt in range(1, judge.attempts + 1):
            reply = await endpoint.chat(
                judge.model,
                messages,
                schema=schema_of(form, n),
                temperature=judge.temperature,
                max_tokens=judge.max_tokens,
            )
            if reply is None:  # asked again by the next call of this command
                break
            ratings = read_ratings(form, reply.text, n)
            if ratings is not None or attempt == judge.attempts:
                cache.put(question.key, question.stored(ratings, attempt))
                break
            messages = [*messages, *_asked_again(reply.text)]
        progress()

    missing = (question for question in questions if cache.get(question.key) is None)
    await in_parallel(missing, one, endpoint.config.concurrency)


def _asked_again(reply: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": _AGAIN}]


def judge_here(config: FeedbackConfig, questions: Sequence[Question], cache: Cache) -> None:
    """Asks a model here, in batches of prompts of about one length, for the missing ratings."""
    judge = config.judge
    missing = [question for question in questions if cache.get(question.key) is None]
    if not missing:
        return
    model = load_model(judge.model)
    sampling = SamplingParams(max_new_tokens=judge.max_tokens, temperature=judge.temperature)
    chats = {question.key: question.messages(as_json=False) for question in missing}
    with tqdm(total=len(questions), initial=len(questions) - len(missing), unit="rating") as bar:
        for attempt in range(1, judge.attempts + 1):
            ids = {q.key: prompt_ids(model.tokenizer, chats[q.key]) for q in missing}
            missing.sort(key=lambda q: (len(ids[q.key]), q.key))
            unread = []
            for start in range(0, len(missing), config.batch_size):
                batch = missing[start : start + config.batch_size]
                weights = (model.cfg, model.params, model.tokenizer)
                texts = generate(*weights, [ids[q.key] for q in batch], sampling, seed=attempt)
                for question, text in zip(batch, texts, strict=True):
                    ratings = read_ratings(FORMS[question.form], text, len(question.order))
                    if ratings is None and attempt < judge.attempts:
                        chats[question.key] += _asked_again(text)
                        unread.append(question)
                        continue
                    cache.put(question.key, question.stored(ratings, attempt))
                    bar.update()
            missing = unread


def implicit_rewards(judge: JudgeConfig, answered: Sequence[Answered]) -> dict[str, list[float]]:
    """Prompt id -> beta (log pi(answer) - log pi_ref(answer)) of its answers, nats.

    The reward of direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 5),
    without the term that depends on the prompt alone. Answers that do not fit the model's positions
    are cut there, as in training.
    """
    models = [load_model(judge.model), load_model(judge.reference)]
    texts = [(each.prompt.text, text) for each in answered for text in each.texts]
    records = [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": text},
            ],
            "source": str(number),  # which stays with a document
        }
        for number, (prompt, text) in enumerate(texts)
    ]
    length = min(model.cfg.max_position_embeddings for model in models)
    own = models[0].lineage.get("config", {}).get("chat")
    rendering = Rendering(ChatConfig(**own) if own else _CHAT, False, length)
    sets = [RecordSet("answers", "", "", records)]
    documents = pack_records(sets, models[0].tokenizer, rendering, length)
    scored = score(documents, models, n_rows=8)
    assert scored.ref_logps is not None, "two models are scored"
    rewards = np.full(len(records), np.nan)  # of an answer without a token that fits
    gains = scored.logps[:, 0] - scored.ref_logps[:, 0]
    rewards[documents.sources.astype(int)] = judge.beta * gains
    values = iter(rewards.tolist())
    return {each.prompt.id: [next(values) for _ in each.texts] for each in answered}


def recorded_ratings(path: str) -> dict[tuple[str, str], Row]:
    """(prompt id, response) -> the completion with its ratings, of rows in UltraFeedback's schema.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no rated row.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file of recorded ratings")
    ratings: dict[tuple[str, str], Row] = {}
    for row in itertools.chain.from_iterable(map(read_rows, chunks_of(Path(path)))):
        if isinstance(row, dict) and isinstance(row.get("completions"), list):
            prompt_id = prompt_digest(str(row.get("instruction", "")))
            for completion in row["completions"]:
                ratings.setdefault((prompt_id, completion.get("response", "")), completion)
    if not ratings:
        raise ValueError(f"{path} has no row with an instruction and rated completions")
    return ratings


def rating_of(completion: Mapping[str, Any], form: str) -> float | None:
    """The rating of a completion on a form, None if it has none."""
    if form == OVERALL:
        return finite(completion.get("overall_score"))
    annotation: Any = (completion.get("annotations") or {}).get(form) or {}
    if isinstance(annotation, list):  # the first release of UltraFeedback
        annotation = annotation[0]
    rating = str(annotation.get("Rating")).removesuffix(".0")
    return float(rating) if rating in ("1", "2", "3", "4", "5") else None
