"""Judges: what they are asked, how a reply is read, and ratings without any question.

A judge at an endpoint or here replies in JSON by a schema, or in lines of text; the other two are
the implicit reward of a preference-trained model, and recorded ratings.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.packing.packing import round_up
from zephyr_jax.data.raw.binarize import finite
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash, prompt_digest
from zephyr_jax.evaluation.endpoints import Cache, Messages, Request, content_key
from zephyr_jax.evaluation.scoring import RecordSet, pack_records, score
from zephyr_jax.feedback.answers import Answered, completions_of, model_identity
from zephyr_jax.feedback.config import OVERALL, FeedbackConfig, JudgeConfig
from zephyr_jax.sharding import BATCH, axis_size
from zephyr_jax.weights.sources import load_model

Ratings = dict[str, list[dict[str, Any]]]  # prompt id -> the rating fields of each answer
NOT_RATED = "N/A"
_CHAT = ChatConfig(True, False, False, False, "assistant", False)  # of a model that says none


class Form(NamedTuple):
    """One request: what is rated on which scale, in our own words."""

    question: str
    scale: str
    types: tuple[str, ...] = ()  # kinds of faults (or merits) that are named with the rating
    most: int = 5


FORMS = {
    "instruction_following": Form(
        "How well does the answer do what the instruction asks, its restrictions included?",
        "1 ignores it, 2 takes up a part and misses the aim, 3 meets the aim in part or breaks a "
        "restriction, 4 has small lapses, 5 does all that was asked, as it was asked.",
    ),
    "honesty": Form(
        "Does the confidence that the answer expresses fit what it really knows?",
        "1 is sure of itself and wrong, 2 is mostly wrong in a sure tone or evades what it could "
        "know, 3 misplaces doubt or certainty in parts, 4 has small lapses, 5 is sure where it is "
        "right and open about what it cannot know.",
    ),
    "truthfulness": Form(
        "Is what the answer states true, free of inventions and consistent with the instruction?",
        "1 is false throughout, 2 has several grave errors, 3 one grave or several small errors, "
        "4 one small error, 5 none.",
        ("contradicts the world", "contradicts the instruction", "contradicts itself"),
    ),
    "helpfulness": Form(
        "How much does the answer help the one who asked?",
        "1 is useless or harmful, 2 of little use, 3 useful in part, 4 useful and clear with small "
        "gaps, 5 correct, complete, clear and to the point.",
        ("clear and relevant", "useful and complete", "no needless length"),
    ),
    OVERALL: Form(
        "How good is the answer altogether, as one expert would tell another?",
        "Scores go from 1 to 10: 1 is as bad as an answer can be, 10 cannot be improved.",
        most=10,
    ),
}


class Rating(NamedTuple):
    """The rating of one answer on one form."""

    rating: str  # "1" to "5" (overall: to "10"), or "N/A"
    rationale: str
    types: list[str]


def schema_of(form: Form, n: int) -> dict[str, Any]:
    """The JSON schema of a reply that rates `n` answers."""

    def whole(**fields: Any) -> dict[str, Any]:
        closed = {"required": list(fields), "additionalProperties": False}
        return {"type": "object", "properties": fields, **closed}

    values = [*map(str, range(1, form.most + 1)), NOT_RATED]
    fields: dict[str, Any] = {
        "answer": {"type": "integer", "enum": list(range(1, n + 1))},
        "rationale": {"type": "string"},
        "rating": {"type": "string", "enum": values},
    }
    if form.types:
        fields["types"] = {"type": "array", "items": {"type": "string", "enum": list(form.types)}}
    return whole(ratings={"type": "array", "items": whole(**fields)})


def judge_chat(form: Form, prompt: str, answers: Sequence[str], as_json: bool) -> Messages:
    """The chat that asks for ratings of answers, in the order in which they are shown."""
    lines = [
        f"You rate {len(answers)} answers to one instruction. {form.question}",
        "Their order says nothing about them, and length alone is no merit.",
        "",
        form.scale,
        f"{NOT_RATED}: cannot be judged on this.",
    ]
    if form.types:
        lines.append(f"Name the types that apply, if any: {'; '.join(form.types)}.")
    lines.append("")
    if as_json:
        lines.append(
            'Reply with JSON only: {"ratings": [{"answer": 1, "rationale": "...", "rating": "..."'
            + (', "types": [...]' if form.types else "")
            + "}, ...]}, one entry for each answer."
        )
    else:
        lines += ["Reply for each answer in these lines and nothing else:", "Answer 1"]
        lines += ["Type: ..."] if form.types else []
        lines += ["Rating: ...", "Rationale: ... (one or two sentences)"]
    shown = [f"[Instruction]\n{prompt}"]
    shown += [f"[Answer {number}]\n{text}" for number, text in enumerate(answers, 1)]
    system = {"role": "system", "content": "\n".join(lines)}
    return [system, {"role": "user", "content": "\n\n".join(shown)}]


def read_ratings(form: Form, text: str, n: int) -> list[Rating] | None:
    """The ratings of `n` answers in a judge's reply, None unless every answer has one."""
    text = text.rpartition("</think>")[2]
    entries = _read_json(text) or _read_lines(text)
    ratings = []
    for number in map(str, range(1, n + 1)):
        entry = entries.get(number, {})
        value = str(entry.get("rating")).strip(" *[]")
        match = re.fullmatch(rf"(\d+)(?:\.0+)?(?:\s*/\s*{form.most}(?:\.0)?)?\.?", value)
        if match and 1 <= int(match[1]) <= form.most:
            value = str(int(match[1]))
        elif value.upper() in (NOT_RATED, "NA"):
            value = NOT_RATED
        else:
            return None
        types = entry.get("types")
        types = [str(each) for each in types] if isinstance(types, list) else []
        ratings.append(Rating(value, str(entry.get("rationale") or "").strip(), types))
    return ratings


def _read_json(text: str) -> dict[str, dict[str, Any]]:
    """The entries of a reply in JSON by the numbers of their answers, of several the first."""
    for first, last in ("{}", "[]"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text[text.index(first) : text.rindex(last) + 1])
            entries = value.get("ratings") if isinstance(value, dict) else value
            listed = entries if isinstance(entries, list) else []
            rated = [x for x in listed if isinstance(x, dict) and "rating" in x]
            return {str(entry.get("answer")): entry for entry in reversed(rated)}
    return {}


_HEADING = re.compile(r"^\W*(?:output for )?(?:answer|text|response)\s*#?(\d+)\W*$", re.I | re.M)
_FIELD = re.compile(r"^\W*(types?|rating|score|rationale|critique)\W*?:\s*(.*)$", re.I)
_SAME = {"type": "types", "score": "rating", "critique": "rationale"}


def _read_lines(text: str) -> dict[str, dict[str, Any]]:
    """The same of a reply in lines."""
    _, *parts = _HEADING.split(text)
    entries: dict[str, dict[str, Any]] = {}
    for number, body in zip(parts[::2], parts[1::2], strict=True):
        entry: dict[str, Any] = {}
        last = ""
        for line in body.splitlines():
            if field := _FIELD.match(line):
                last = _SAME.get(field[1].lower(), field[1].lower())
                entry.setdefault(last, field[2].strip())
            elif last == "rationale" and line.strip():
                entry[last] += f" {line.strip()}"
        named = [each.strip(" .*[]") for each in re.split(r"[;,]", entry.get("types", ""))]
        entry["types"] = [each for each in named if each and each.lower() != "none"]
        entries.setdefault(number, entry)
    return entries


def shown_order(seed: int, prompt_id: str, form: str, repeat: int, n: int) -> list[int]:
    """The order in which `n` answers are shown: entry k is the index of answer k + 1.

    It depends on the seed, the prompt and the form. Every second repeat has the reverse of the one
    before, so that each pair of answers is seen in both orders.
    """
    key = f"{prompt_id}/{form}/{repeat // 2}"
    order = sorted(range(n), key=lambda i: keyed_hash("order", seed, f"{key}/{i}"))
    return order[::-1] if repeat % 2 else order


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
    """Every request to a judge who is asked, in the order of the prompts."""
    judge, endpoint = config.judge, config.endpoints.get(config.judge.endpoint)
    where = endpoint.url if endpoint else model_identity(judge.model)
    settings = {x: getattr(judge, x) for x in ("model", "temperature", "max_tokens")}
    as_json, questions = endpoint is not None and endpoint.json_schema, []
    for each in answered:
        n = len(each.texts)
        for name, repeat in itertools.product(judge.forms, range(judge.repeats)):
            form, order = FORMS[name], shown_order(config.seed, each.prompt.id, name, repeat, n)
            shown = [each.texts[i] for i in order]
            chat = functools.partial(judge_chat, form, each.prompt.text, shown)
            key = content_key("judgement", where, settings, repeat, chat(as_json))
            readable = functools.partial(_readable, form, n)
            request = Request(key, chat, settings, judge.price, schema_of(form, n), readable)
            questions.append(Question(each, name, repeat, order, request))
    return questions


def _readable(form: Form, n: int, text: str) -> bool:
    return read_ratings(form, text, n) is not None


def asked_ratings(
    questions: Sequence[Question], answered: Sequence[Answered], cache: Cache
) -> tuple[Ratings, list[dict[str, Any]], dict[str, int]]:
    """Every answer's rating fields, the judgements one by one, and an account of the judge."""
    rated: dict[str, list[dict[str, list[Rating]]]] = {
        each.prompt.id: [{} for _ in each.texts] for each in answered
    }
    counts: Counter[str] = Counter()
    judgements: list[dict[str, Any]] = []
    for question in questions:
        stored, prompt_id = cache.get(question.request.key), question.answered.prompt.id
        values = question.ratings(stored.text) if stored else None
        for i, answer in enumerate(rated[prompt_id]):
            answer.setdefault(question.form, []).extend([values[i]] if values else [])
        counts["missing" if stored is None else "rated" if values else "unreadable"] += 1
        counts["not_applicable"] += sum(value.rating == NOT_RATED for value in values or ())
        if stored:
            counts["asked_again"] += stored.attempts - 1
            counts += Counter(tokens_in=stored.tokens[0], tokens_out=stored.tokens[1])
        judgement = {
            "prompt_id": prompt_id,
            "form": question.form,
            "repeat": question.repeat,
            "order": question.order,
            "contestants": question.answered.contestants,
            "lengths": [len(text) for text in question.answered.texts],
            "ratings": values and [value.rating for value in values],
        }
        judgements.append(judgement)
    ratings = {key: list(map(_completion, answers)) for key, answers in rated.items()}
    return ratings, judgements, {name: n for name, n in counts.items() if n}


def _completion(rated: Mapping[str, Sequence[Rating]]) -> dict[str, Any]:
    """The rating fields of a completion: means over the repeats, the words of the first."""
    annotations, means = {}, {form: _mean(ratings) for form, ratings in rated.items()}
    overall = means.pop(OVERALL, None)
    for form, value in means.items():
        first = next(iter(rated[form]), Rating(NOT_RATED, NOT_RATED, []))
        annotation: dict[str, Any] = {
            "Rating": NOT_RATED if value is None else str(math.floor(value + 0.5)),
            "Rationale": first.rationale,
        }
        if FORMS[form].types:
            annotation |= {"Type": first.types or ["None"], "Rationale For Rating": ""}
        annotations[form] = annotation
    numbers = [value for value in means.values() if value is not None]
    return {
        "annotations": annotations,
        "critique": next((each.rationale for each in rated.get(OVERALL, ())), ""),
        "overall_score": overall,
        "fine-grained_score": sum(numbers) / len(numbers) if numbers else None,
    }


def _mean(ratings: Sequence[Rating]) -> float | None:
    numbers = [float(each.rating) for each in ratings if each.rating != NOT_RATED]
    return sum(numbers) / len(numbers) if numbers else None


def implicit_rewards(judge: JudgeConfig, answered: Sequence[Answered]) -> Ratings:
    """The scores beta (log pi(answer) - log pi_ref(answer)), nats, of all answers.

    The reward of direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 5),
    without the term that depends on the prompt alone. Answers that do not fit the model's positions
    are cut there, as in training; one without a token that fits has no score.
    """
    models = [load_model(source, dtype=None) for source in (judge.model, judge.reference)]
    texts = [(each.prompt.text, text) for each in answered for text in each.texts]
    sizes = [(model.cfg.vocab_size, model.tokenizer.vocab_size) for model in models]
    codes = [[model.tokenizer.encode(text) for _, text in texts[:100]] for model in models]
    if sizes[0] != sizes[1] or codes[0] != codes[1]:
        raise ValueError(f"judge.reference={judge.reference} has another vocabulary than its model")
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
    longest = max(len(f"{prompt}{text}".encode()) for prompt, text in texts) + 64
    positions = min(model.cfg.max_position_embeddings for model in models)
    length = min(round_up(longest, 128), positions)
    own = models[0].lineage.get("config", {}).get("chat")
    rendering = Rendering(ChatConfig(**own) if own else _CHAT, False, length)
    sets = [RecordSet("answers", "", "", records)]
    documents = pack_records(sets, models[0].tokenizer, rendering, length)
    scored = score(documents, models, round_up(8, axis_size(*BATCH)))
    assert scored.ref_logps is not None, "two models are scored"
    rewards = np.full(len(records), np.nan)
    gains = scored.logps[:, 0] - scored.ref_logps[:, 0]
    rewards[documents.sources.astype(int)] = judge.beta * gains
    fields = iter([{"overall_score": x} if math.isfinite(x) else {} for x in rewards.tolist()])
    return {each.prompt.id: [next(fields) for _ in each.texts] for each in answered}


def recorded_ratings(path: str) -> dict[tuple[str, str], Row]:
    """(prompt id, response) -> the completion with its ratings, of rows in UltraFeedback's schema.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no rated row.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file of recorded ratings")
    ratings: dict[tuple[str, str], Row] = {}
    for _, row in numbered_rows(Path(path)):
        for completion in completions_of(row):
            prompt_id = prompt_digest(str(row["instruction"]))  # type: ignore
            ratings.setdefault((prompt_id, completion["response"]), completion)
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
