"""Judges: asked at an endpoint or here, or without any question by reward or by record."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.raw.binarize import finite
from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, prompt_digest
from zephyr_jax.evaluation.scoring import RecordSet, pack_records, score
from zephyr_jax.feedback.answers import Answered
from zephyr_jax.feedback.asking import Cache, Request, content_key, model_identity
from zephyr_jax.feedback.config import OVERALL, FeedbackConfig, JudgeConfig
from zephyr_jax.feedback.forms import (
    FORMS,
    NOT_RATED,
    Form,
    Rating,
    judge_messages,
    read_ratings,
    schema_of,
    shown_order,
)
from zephyr_jax.weights.sources import load_model

Ratings = dict[str, list[dict[str, Any]]]  # prompt id -> the rating fields of each answer
_CHAT = ChatConfig(True, False, False, False, "assistant", False)  # of a model that says none


class Question(NamedTuple):
    """One request to a judge: all answers to a prompt on one form."""

    answered: Answered
    form: str
    repeat: int
    order: list[int]  # entry k is the index of the answer that is shown as k + 1
    request: Request

    def ratings(self, text: str) -> list[Rating] | None:
        """The ratings in a reply, in the order of the contestants; None if it cannot be read."""
        shown = read_ratings(FORMS[self.form], text, len(self.order))
        return shown and [shown[self.order.index(i)] for i in range(len(self.order))]


def judge_questions(config: FeedbackConfig, answered: Sequence[Answered]) -> list[Question]:
    """Every request that a judge who is asked gets, in the order of the prompts."""
    judge = config.judge
    where = model_identity(judge.model) if judge.kind == "model" else judge.model
    endpoint = config.endpoints[judge.endpoint] if judge.endpoint else None
    what = [where, endpoint.url if endpoint else "", judge.temperature, judge.max_tokens]
    as_json = endpoint is not None and endpoint.json_schema
    questions = []
    for each in answered:
        n = len(each.texts)
        for name, repeat in itertools.product(judge.forms, range(judge.repeats)):
            form, order = FORMS[name], shown_order(config.seed, each.prompt.id, name, repeat, n)
            shown = [each.texts[i] for i in order]
            messages = judge_messages(form, each.prompt.text, shown, as_json=as_json)
            readable = functools.partial(_readable, form, n)
            key = content_key("judgement", what, repeat, messages)
            request = Request(key, messages, readable, schema_of(form, n))
            questions.append(Question(each, name, repeat, order, request))
    return questions


def _readable(form: Form, n: int, text: str) -> bool:
    return read_ratings(form, text, n) is not None


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


def asked_ratings(
    questions: Sequence[Question], answered: Sequence[Answered], cache: Cache
) -> tuple[Ratings, list[dict[str, Any]], dict[str, int]]:
    """Every answer's rating fields, the judgements one by one, and counts."""
    said: dict[str, list[dict[str, list[Rating]]]] = {
        each.prompt.id: [{} for _ in each.texts] for each in answered
    }
    counts: Counter[str] = Counter()
    judgements: list[dict[str, Any]] = []
    for question in questions:
        stored = cache.get(question.request.key)
        values = question.ratings(stored["text"]) if stored else None
        for answer, value in zip(said[question.answered.prompt.id], values or (), strict=False):
            answer.setdefault(question.form, []).append(value)
        counts["missing" if stored is None else "rated" if values else "unreadable"] += 1
        counts["asked_again"] += max(0, stored["attempts"] - 1) if stored else 0
        counts["not_applicable"] += sum(value.rating == NOT_RATED for value in values or ())
        judgement = {
            "prompt_id": question.answered.prompt.id,
            "form": question.form,
            "repeat": question.repeat,
            "order": question.order,
            "contestants": question.answered.contestants,
            "lengths": [len(text) for text in question.answered.texts],
            "ratings": values and [value.rating for value in values],
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
