"""Judges: what they are asked, how a reply is read, and ratings without any question."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.packing.packing import round_up
from zephyr_jax.data.raw.binarize import finite, mean_rating
from zephyr_jax.data.raw.schema import Row, keyed_hash
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.endpoints import Cache, Messages, Request, Spending, content_key
from zephyr_jax.feedback.answers import Answered, ask, identity_of, recorded_ratings
from zephyr_jax.feedback.config import OVERALL, FeedbackConfig, JudgeConfig
from zephyr_jax.sharding import BATCH, axis_size
from zephyr_jax.weights.sources import load_model

Rate = Callable[[str, str], dict[str, Any]]  # prompt, answer -> `overall_score` and so on
NOT_RATED = "N/A"


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

    number: float | None  # 1 to 5 (overall: to 10); None for N/A
    rationale: str
    types: Sequence[str] = ()


def schema_of(form: Form, n: int) -> dict[str, Any]:
    """The JSON schema of a reply that rates `n` answers."""
    fields: dict[str, Any] = {
        "answer": {"type": "integer", "enum": list(range(1, n + 1))},
        "rationale": {"type": "string"},
        "rating": {"type": "string", "enum": [*map(str, range(1, form.most + 1)), NOT_RATED]},
    }
    if form.types:
        fields["types"] = {"type": "array", "items": {"type": "string", "enum": list(form.types)}}
    return _closed(ratings={"type": "array", "items": _closed(**fields)})


def _closed(**fields: Any) -> dict[str, Any]:
    shape = {"required": list(fields), "additionalProperties": False}
    return {"type": "object", "properties": fields, **shape}


def judge_chat(form: Form, prompt: str, answers: Sequence[str], as_json: bool) -> Messages:
    """The chat that asks for ratings of answers, in the order in which they are shown."""
    types, as_types = "", ""
    if form.types:
        types = f"\nName the types that apply, if any: {'; '.join(form.types)}."
        as_types = ', "types": [...]' if as_json else "\nType: ..."
    reply = "Reply for each answer in these lines and nothing else:\nAnswer 1"
    reply += f"{as_types}\nRating: ...\nRationale: ... (one or two sentences)"
    if as_json:
        reply = 'Reply with JSON only: {"ratings": [{"answer": 1, "rationale": "...", "rating": '
        reply += f'"..."{as_types}}}, ...]}}, one entry for each answer.'
    task = f"""You rate {len(answers)} answers to one instruction. {form.question}
Their order says nothing about them, and length alone is no merit.

{form.scale}
{NOT_RATED}: cannot be judged on this.{types}

{reply}"""
    shown = [f"[Instruction]\n{prompt}"]
    shown += [f"[Answer {number}]\n{text}" for number, text in enumerate(answers, 1)]
    chat = {"system": task, "user": "\n\n".join(shown)}
    return [{"role": role, "content": text} for role, text in chat.items()]


def read_ratings(form: Form, text: str, n: int) -> list[Rating] | None:
    """The ratings of `n` answers in a judge's reply, None unless every answer has one."""
    text = text.rpartition("</think>")[2]
    entries, ratings = _read_json(text) or _read_lines(text), []
    for number in map(str, range(1, n + 1)):
        entry = entries.get(number, {})
        value = str(entry.get("rating")).strip(" *[]").upper()
        match = re.fullmatch(rf"(\d+)(?:\.0+)?(?:\s*/\s*{form.most}(?:\.0)?)?\.?", value)
        number = float(match[1]) if match else None
        if value not in (NOT_RATED, "NA") and not 1 <= (number or 0) <= form.most:
            return None
        types = entry.get("types")
        types = list(map(str, types)) if isinstance(types, list) else []
        ratings.append(Rating(number, str(entry.get("rationale") or "").strip(), types))
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
_FIELD = re.compile(r"^\W*(type|rating|score|rationale|critique)s?\W*?:", re.I | re.M)
_SAME = {"type": "types", "score": "rating", "critique": "rationale"}


def _read_lines(text: str) -> dict[str, dict[str, Any]]:
    _, *parts = _HEADING.split(text)
    entries: dict[str, dict[str, Any]] = {}
    for number, body in zip(parts[::2], parts[1::2], strict=True):
        _, *fields = _FIELD.split(body)
        names = [_SAME.get(name.lower(), name.lower()) for name in fields[::2]]
        entry: dict[str, Any] = dict(zip(names[::-1], fields[-1::-2], strict=True))
        entry["rating"] = entry.get("rating", "").strip().partition("\n")[0]
        entry["rationale"] = " ".join(entry.get("rationale", "").split())
        named = [each.strip(" .*[]\n") for each in re.split(r"[;,]", entry.get("types", ""))]
        entry["types"] = [each for each in named if each and each.lower() != "none"]
        entries.setdefault(number, entry)
    return entries


def shown_order(seed: int, prompt_id: str, form: str, repeat: int, n: int) -> list[int]:
    """Entry k is the index of answer k + 1 as shown; each second repeat reverses the one before."""
    key = f"{prompt_id}/{form}/{repeat // 2}"
    order = sorted(range(n), key=lambda i: keyed_hash("order", seed, f"{key}/{i}"))
    return order[::-1] if repeat % 2 else order


def judge(
    config: FeedbackConfig,
    answered: Sequence[Answered],
    cache: Cache,
    spending: Spending,
    rate: Rate | None = None,
) -> tuple[dict[str, list[Row]], list[Row], dict[str, Any]]:
    """The rating fields of all answers by prompt id, the judgements, an account of the judge."""
    if config.judge.kind in ("endpoint", "model"):
        questions = _questions(config, answered)
        requests = [request for _, request in questions]
        ask(config, {"judge": (config.judge, requests)}, cache, spending, config.judge.attempts)
        return _asked_ratings(questions, answered, cache)
    known: dict[tuple[str, str], Row] = {}
    if config.judge.kind == "recorded":
        known = recorded_ratings(config.judge.ratings)
    elif config.judge.kind == "implicit_reward":
        known = _implicit_rewards(config.judge, answered)
    elif rate is not None:
        known = {
            (x.prompt.id, text): rate(x.prompt.text, text) for x in answered for text in x.texts
        }
    ratings = {
        x.prompt.id: [known.get((x.prompt.id, text), {}) for text in x.texts] for x in answered
    }
    judgements, counts = [], Counter[str]()
    for each in answered:
        rated = ratings[each.prompt.id]
        columns = [[rating_of(x, form) for x in rated] for form in config.judge.forms]
        for form, own in zip(config.judge.forms, columns, strict=True):
            judgements.append(_judgement(each, form, 0, None, own))
        for own in zip(*columns, strict=True):
            counts["not_rated" if own.count(None) == len(own) else "rated"] += 1
    return ratings, judgements, dict(counts)


def _questions(config: FeedbackConfig, answered: Sequence[Answered]) -> list[tuple[Row, Request]]:
    """Every request to a judge who is asked, after its judgement, whose ratings are to come."""
    own, endpoint = config.judge, config.endpoints.get(config.judge.endpoint)
    questions, as_json = [], endpoint is not None and "response_format" not in endpoint.omit
    identity = identity_of(config, own)
    for each in answered:
        n = len(each.texts)
        for name, repeat in itertools.product(own.forms, range(own.repeats)):
            form, order = FORMS[name], shown_order(config.seed, each.prompt.id, name, repeat, n)
            shown = [each.texts[i] for i in order]
            chat = functools.partial(judge_chat, form, each.prompt.text, shown)
            key = content_key("judgement", identity, repeat, chat(as_json))
            readable = functools.partial(read_ratings, form, n=n)
            request = Request(key, chat, own.settings(), own.price, schema_of(form, n), readable)
            questions.append((_judgement(each, name, repeat, order, None), request))
    return questions


def _asked_ratings(
    questions: Sequence[tuple[Row, Request]], answered: Sequence[Answered], cache: Cache
) -> tuple[dict[str, list[Row]], list[Row], dict[str, Any]]:
    rated = {each.prompt.id: [defaultdict(list) for _ in each.texts] for each in answered}
    counts = Counter[str]()
    for judgement, request in questions:
        stored, form, order = cache.get(request.key), judgement["form"], judgement["order"]
        shown = read_ratings(FORMS[form], stored.text, len(order)) if stored else None
        values = [shown[order.index(i)] for i in range(len(order))] if shown else []
        judgement["ratings"] = [x.number for x in values] or None
        for i, answer in enumerate(rated[judgement["prompt_id"]]):
            answer[form] += values[i : i + 1]
        counts["missing" if stored is None else "rated" if values else "unreadable"] += 1
        counts += Counter(not_applicable=sum(x.number is None for x in values))
        if stored:
            tokens = dict(zip(("tokens_in", "tokens_out"), stored.tokens, strict=True))
            counts += Counter(asked_again=stored.attempts - 1, **tokens)
    ratings = {key: list(map(_completion, answers)) for key, answers in rated.items()}
    return ratings, [judgement for judgement, _ in questions], dict(counts)


def _judgement(each: Answered, form: str, repeat: int, order: Any, ratings: Any) -> Row:
    """A line of the file of judgements: the ratings, None where there is none."""
    return {
        "prompt_id": each.prompt.id,
        "form": form,
        "repeat": repeat,
        "order": order,
        "contestants": each.contestants,
        "lengths": [len(text) for text in each.texts],
        "ratings": ratings,
    }


def _completion(rated: Mapping[str, Sequence[Rating]]) -> Row:
    """The rating fields of a completion: means over the repeats, the words of the first."""
    means, annotations = {}, {}
    words = {form: each[0] if each else Rating(None, NOT_RATED) for form, each in rated.items()}
    for form, each in rated.items():
        numbers = [x.number for x in each if x.number]
        mean = means[form] = sum(numbers) / len(numbers) if numbers else None
        if form != OVERALL:
            rounded = NOT_RATED if mean is None else str(math.floor(mean + 0.5))
            annotations[form] = {"Rating": rounded, "Rationale": words[form].rationale}
        if FORMS[form].types:
            annotations[form] |= {"Type": words[form].types or ["None"], "Rationale For Rating": ""}
    aspects = [value for form, value in means.items() if form != OVERALL and value]
    return {
        "annotations": annotations,
        "critique": words[OVERALL].rationale if OVERALL in words else "",
        "overall_score": means.get(OVERALL),
        "fine-grained_score": sum(aspects) / len(aspects) if aspects else None,
    }


def _implicit_rewards(own: JudgeConfig, answered: Sequence[Answered]) -> dict[tuple[str, str], Row]:
    """(prompt id, answer) -> the score beta (log pi(answer) - log pi_ref(answer)), nats.

    DPO's reward (Rafailov et al. 2023, arXiv:2305.18290, eq. 5) without the term of the prompt
    alone. Answers are cut at the model's positions; one without a token that fits has no score.
    """
    models = [load_model(source, dtype=None) for source in (own.model, own.reference)]
    texts = [(each.prompt, text) for each in answered for text in each.texts]
    some = [text for _, text in texts[:100]]
    scoring.check_same_vocabulary(f"judge.reference={own.reference}", models, some)
    records = []
    for number, (prompt, text) in enumerate(texts):
        turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": text}]
        records.append({"messages": turns, "source": str(number)})  # which a document keeps
    longest = max(len(f"{prompt.text}{text}".encode()) for prompt, text in texts) + 64
    positions = min(model.cfg.max_position_embeddings for model in models)
    length = min(round_up(longest, 128), positions)
    rendering = Rendering(scoring.chat_of(models[0])[0], False, length)
    sets = [scoring.RecordSet("answers", "", "", records)]
    documents = scoring.pack_records(sets, models[0].tokenizer, rendering, length)
    scored = scoring.score(documents, models, round_up(8, axis_size(*BATCH)))
    assert scored.ref_logps is not None, "two models are scored"
    gains = scored.logps[:, 0] - scored.ref_logps[:, 0]
    each = ((*texts[int(i)], gain) for i, gain in zip(documents.sources, gains, strict=True))
    return {(prompt.id, text): {"overall_score": own.beta * float(x)} for prompt, text, x in each}


def rating_of(completion: Mapping[str, Any], form: str) -> float | None:
    """The rating of a completion on a form, None if it has none."""
    if form == OVERALL:
        return finite(completion.get("overall_score"))
    annotations = completion.get("annotations")
    own = annotations.get(form) if isinstance(annotations, dict) else None
    return mean_rating({"annotations": {form: own}})
