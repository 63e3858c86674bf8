"""Prompts and the answers to them: where prompts come from, and who answers by which principle."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw import schema
from zephyr_jax.data.raw.filters import contamination, load_contaminants
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import Row, prompt_digest
from zephyr_jax.data.raw.sources import find_sources
from zephyr_jax.evaluation import endpoints
from zephyr_jax.evaluation.answers import batched_replies
from zephyr_jax.evaluation.endpoints import Cache, Request, Spending
from zephyr_jax.feedback.config import SYSTEM_PROMPTS, AskedConfig, FeedbackConfig, PromptsConfig
from zephyr_jax.storage import files_below
from zephyr_jax.weights.checkpoint import Model, workdir_and_steps
from zephyr_jax.weights.sources import load_model, resolve

# The columns that hold the prompt, of several the first, and those that hold a recorded answer.
_PROMPTS = {"instruction": "text", "prompt": "text or turns", "question": "text"}
_PROMPTS |= {"messages": "turns", "conversations": "turns"}
_ANSWERS = ("response", "reply", "output", "completion")


class Prompt(NamedTuple):
    """One question; `source` is the column of its row, or the name of the set."""

    id: str  # SHA-256 of its text
    text: str
    source: str


class Answered(NamedTuple):
    """A prompt, who answered it, and the answers."""

    prompt: Prompt
    contestants: list[str]
    texts: list[str]


def read_prompts(config: PromptsConfig, seed: int) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts in the order in which they were read, and counts of what was left out."""
    contaminants = load_contaminants(config.decontaminate)
    counts, prompts = Counter[str](), dict[str, Prompt]()
    for text, source in _texts(config):
        key, turn = prompt_digest(text or ""), {"role": "user", "content": text}
        counts["read"] += 1
        if text is None:
            counts["unreadable"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif key in prompts:
            counts["duplicate"] += 1
        elif contamination({"messages": [turn]}, contaminants):
            counts["contaminated"] += 1
        else:
            prompts[key] = Prompt(key, text, source)
    drawn = list(prompts.values())
    if config.count and config.count < len(drawn):
        counts["not_drawn"] = len(drawn) - config.count
        selected = sorted(random.Random(seed).sample(range(len(drawn)), config.count))
        drawn = [drawn[i] for i in selected]
    if not drawn:
        raise ValueError(f"prompts.source={config.source} has no prompt to answer: {dict(counts)}")
    return drawn, {**counts, "prompts": len(drawn)}


def _texts(config: PromptsConfig) -> Iterator[tuple[str | None, str]]:
    """Each row's first question, None if it has none, and where the row says it is from."""
    base = Path(config.data_dir).expanduser() / config.source
    if versions := sorted(path.parent for path in base.glob("*/dataset_info.json")):
        train, _ = prepare.report(versions[-1])["rows"]["kept"]
        for record in prepare.read_split(versions[-1], config.split or train):
            yield record["prompt"], record.get("source") or config.source
        return
    shapes, splits = tuple((name,) for name in _PROMPTS), (config.split or "train", "test")
    wanted = schema.Schema(shapes, splits, lambda _: ([], Counter()), lambda *_: [], {})
    for file in find_sources(config.source, wanted).files:
        if file.split != "test":  # held-out rows stay so
            for _, row in numbered_rows(file.path):
                source = row.get("source") if isinstance(row, dict) else None
                yield first_question(row), str(source or Path(config.source).name)


def first_question(row: Row | str) -> str | None:
    """The text of a row's first question, None where it has none in the known columns."""
    if not isinstance(row, dict):
        return None
    (column,) = schema.first_columns(row, [(name,) for name in _PROMPTS])
    try:
        schema.check_types(row, {column: _PROMPTS[column], "input": "text?"})
        turns = schema.Reader(row).turns(column, "" if _PROMPTS[column] == "turns" else "user")
    except schema.BadRow:
        return None
    text = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
    if text is None or text != text.encode(errors="replace").decode():  # half of a pair
        return None
    return schema.joined(text, row.get("input")) if column == "instruction" else text


def draw_principle(config: FeedbackConfig, prompt: Prompt, contestant: str) -> str:
    """The principle of an answer, drawn by the seed, the prompt and the contestant; "" for none."""
    if not config.principles or config.contestants[contestant].answers:
        return ""
    drawn = random.Random(schema.keyed_hash("principle", config.seed, f"{prompt.id}/{contestant}"))
    return drawn.choices(list(config.principles), list(config.principles.values()))[0]


def answer_requests(config: FeedbackConfig, name: str, prompts: Sequence[Prompt]) -> list[Request]:
    """The requests to a contestant that is asked, in the order of the prompts."""
    one, requests = config.contestants[name], []
    identity = identity_of(config, one)
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt.text}]
        if principle := draw_principle(config, prompt, name):
            chat.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[principle]})
        key = endpoints.content_key("answer", identity, chat)
        requests.append(Request(key, lambda _, chat=chat: chat, one.settings(), one.price))
    return requests


def identity_of(config: FeedbackConfig, asked: AskedConfig) -> list[Any]:
    """What, with the chat, decides a reply: the model (here its files) and how it is sampled."""
    if asked.endpoint:
        return [config.endpoints[asked.endpoint].url, asked.settings()]
    place = epath.Path(resolve(asked.model))
    root, steps = workdir_and_steps(place)
    folder = root / "checkpoints" / str(max(steps)) if steps else place
    files = files_below(folder) if folder.is_dir() else [folder]
    stats = [(file.name, file.stat()) for file in files]
    return [[(name, stat.length, stat.mtime) for name, stat in stats], asked.settings()]


def ask(
    config: FeedbackConfig,
    asked: Mapping[str, tuple[AskedConfig, Sequence[Request]]],
    cache: Cache,
    spending: Spending,
    attempts: int = 1,
) -> None:
    """Asks models, by their names, what the cache lacks: those here, then all endpoints at once.

    Of several processes all compute, and the cache of the first one counts.
    """
    at_endpoints, loaded = defaultdict[str, list[Request]](list), dict[str, Model]()
    for name, (one, requests) in sorted(asked.items(), key=lambda item: item[1][0].model):
        if one.endpoint:
            at_endpoints[one.endpoint] += requests
            continue
        lacks = np.asarray([cache.get(request.key) is None for request in requests])
        if jax.process_count() > 1:
            lacks = np.asarray(multihost_utils.broadcast_one_to_all(lacks))
        if lacks.any() and one.model not in loaded:
            loaded.clear()  # the earlier one is freed first
            loaded[one.model] = load_model(one.model, dtype=None)
        chats, attempt = [request.chat(False) for request in requests], 1
        while lacks.any():
            how = one.sampling(), config.batch_size, set(np.flatnonzero(lacks).tolist()), name
            for i, reply in batched_replies(loaded[one.model], chats, *how):
                fits = requests[i].readable(reply.text) or reply.finish == "too_long"
                lacks[i] = not fits and attempt < attempts
                if lacks[i]:
                    chats[i] = [*chats[i], *endpoints.asked_again(reply.text)]
                elif not jax.process_index():
                    cache[requests[i].key] = reply._replace(attempts=attempt)
            attempt += 1
    if not jax.process_index():
        name = ", ".join(name for name, (one, _) in asked.items() if one.endpoint)
        more: Any = {"attempts": attempts, "name": name}
        endpoints.ask_endpoints(config.endpoints, at_endpoints, cache, spending, **more)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("asked")


def recorded_answers(path: str, name: str) -> dict[str, str]:
    """The answers in a file of rows by the ids of their prompts; of several to one the first.

    Of a row in the raw UltraFeedback schema the completion of the model `name` counts. A
    FileNotFoundError if there is no such file, a ValueError if no row has a prompt and an answer.
    """
    answers: dict[str, str] = {}
    for prompt_id, row in _recorded(path):
        named = [x["response"] for x in _completions(row) if x.get("model") == name]
        for text in [*named, *(row[x] for x in _ANSWERS if isinstance(row.get(x), str))]:
            answers.setdefault(prompt_id, text)
    if not answers:
        raise ValueError(f"{path} has no row with a prompt and an answer of {name} to it")
    return answers


def recorded_ratings(path: str) -> dict[tuple[str, str], Row]:
    """(prompt id, response) -> the completion with its ratings, of rows as UltraFeedback's."""
    rated = [(key, x) for key, row in _recorded(path) for x in _completions(row)]
    if not rated:
        raise ValueError(f"{path} has no row with an instruction and rated completions")
    return {(key, completion["response"]): completion for key, completion in reversed(rated)}


def _recorded(path: str) -> Iterator[tuple[str, Row]]:
    for _, row in numbered_rows(Path(path)):
        if isinstance(row, dict) and (question := first_question(row)) is not None:
            yield prompt_digest(question), row


def _completions(row: Row) -> list[Row]:
    listed = row["completions"] if isinstance(row.get("completions"), list) else []
    return [x for x in listed if isinstance(x, dict) and isinstance(x.get("response"), str)]


def answers_to(
    config: FeedbackConfig,
    prompts: Sequence[Prompt],
    requests: Mapping[str, Sequence[Request]],
    recorded: Mapping[str, Mapping[str, str]],
    cache: Cache,
) -> tuple[list[Answered], dict[str, dict[str, Any]]]:
    """The prompts with at least one answer and their answers, and an account by contestant.

    Left out and counted: answers `missing`, `refused` or `empty`, and prompts `too_long` for it.
    """
    counts = {name: Counter[str]() for name in config.contestants}
    answered = []
    for i, prompt in enumerate(prompts):
        each = Answered(prompt, [], [])
        for name, count in counts.items():
            stored = cache.get(requests[name][i].key) if name in requests else None
            text = stored.text if stored else recorded.get(name, {}).get(prompt.id)
            kind = "missing" if text is None else "answered" if text.strip() else "empty"
            if stored:
                kind = stored.finish if stored.finish in ("refused", "too_long") else kind
                count += Counter(tokens_in=stored.tokens[0], tokens_out=stored.tokens[1])
                count += Counter({"cut_at_max_tokens": stored.finish == "length"})
            count[kind] += 1
            if text is not None and kind == "answered":
                each.contestants.append(name)
                each.texts.append(text)
        if each.texts:
            answered.append(each)
    if not answered:
        raise ValueError(f"no prompt has an answer: { {k: dict(x) for k, x in counts.items()} }")
    return answered, {name: dict(count) for name, count in counts.items()}
