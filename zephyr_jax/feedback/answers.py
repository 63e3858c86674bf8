"""Prompts and the answers to them: from where prompts come, who answers, and under what principle.

Models here and behind endpoints are asked, or recorded answers are looked up.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.filters import contamination, load_contaminants
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import (
    Row,
    Schema,
    first_columns,
    joined,
    keyed_hash,
    prompt_digest,
)
from zephyr_jax.data.raw.sources import find_sources
from zephyr_jax.data.raw.turns import as_turns, wrong_type
from zephyr_jax.evaluation.endpoints import (
    Cache,
    Request,
    asked_again,
    batched_replies,
    content_key,
)
from zephyr_jax.feedback.config import FeedbackConfig, PromptsConfig
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import files_below
from zephyr_jax.weights.checkpoint import Model, workdir_and_steps
from zephyr_jax.weights.sources import resolve

# The columns that hold the prompt, of several the first, and those that hold a recorded answer.
_PROMPTS = {"instruction": "text", "prompt": "text or turns", "question": "text"}
_PROMPTS |= {"messages": "turns", "conversations": "turns"}
_ANSWERS = ("response", "reply", "output", "completion")
_SAMPLE = 1 << 16  # bytes at each end of a file that identify it, with its size
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


class Prompt(NamedTuple):
    """One question, by whose id everything about it is found again."""

    id: str  # SHA-256 of its text
    text: str
    source: str  # the column `source` of its row, or the name of the set


class Answered(NamedTuple):
    """A prompt and the answers to it, in the order of the contestants."""

    prompt: Prompt
    contestants: list[str]
    texts: list[str]


def read_prompts(config: PromptsConfig, seed: int) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts in the order in which they were read, and counts of what was left out.

    Left out are rows without a text (`empty`), rows of other shapes (`unreadable`), repeated
    prompts (`duplicate`), those that meet a benchmark (`contaminated`) and what was `not_drawn`.

    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if no prompt is left.
    """
    contaminants = load_contaminants(config.decontaminate)
    counts, prompts = Counter[str](), dict[str, Prompt]()
    for text, source in _texts(config):
        counts["read"] += 1
        key = prompt_digest(text or "")
        if text is None:
            counts["unreadable"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif key in prompts:
            counts["duplicate"] += 1
        elif contamination({"messages": [{"role": "user", "content": text}]}, contaminants):
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
        split = config.split or prepare.report(versions[-1])["rows"]["kept"][0]
        for record in prepare.read_split(versions[-1], split):
            yield record["prompt"], record.get("source") or config.source
        return
    schema = Schema(
        shapes=tuple((name,) for name in _PROMPTS),
        splits=(config.split or "train", "test"),
        problem=lambda _: None,
        convert=lambda _: ([], Counter()),
        texts=lambda _row, _rule: [],
        rules={},
    )
    for file in find_sources(config.source, schema).files:
        if file.split != "test":  # held-out rows stay so
            for _, row in numbered_rows(file.path):
                source = row.get("source") if isinstance(row, dict) else None
                yield first_question(row), str(source or Path(config.source).name)


def first_question(row: Row | str) -> str | None:
    """The text of a row's first question, None where it has none in the known columns."""
    if not isinstance(row, dict):
        return None
    (column,) = first_columns(row, [(name,) for name in _PROMPTS])
    if wrong_type(row, {column: _PROMPTS[column], "input": "text?"}):
        return None
    texts = (turn["content"] for turn in as_turns(row[column]) if turn["role"] == "user")
    text = next(texts, None)
    return joined(text, row.get("input")) if column == "instruction" else text


def draw_principle(config: FeedbackConfig, prompt: Prompt, contestant: str) -> str:
    """The principle of an answer, drawn by the seed, the prompt and the contestant; "" for none."""
    if not config.principles or config.contestants[contestant].answers:
        return ""
    drawn = random.Random(keyed_hash("principle", config.seed, f"{prompt.id}/{contestant}"))
    return drawn.choices(list(config.principles), list(config.principles.values()))[0]


def answer_requests(config: FeedbackConfig, prompts: Sequence[Prompt]) -> dict[str, list[Request]]:
    """The requests to each contestant that is asked, in the order of the prompts."""
    requests = {}
    for name, one in config.contestants.items():
        if one.answers:
            continue
        settings = {x: getattr(one, x) for x in ("model", "temperature", "top_p", "max_tokens")}
        settings["seed"] = one.seed
        where = config.endpoints[one.endpoint].url if one.endpoint else model_identity(one.model)
        requests[name] = []
        for prompt in prompts:
            chat = [{"role": "user", "content": prompt.text}]
            if principle := draw_principle(config, prompt, name):
                chat.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[principle]})
            key = content_key("answer", where, settings, chat)
            requests[name].append(Request(key, lambda _, x=chat: x, settings, one.price))
    return requests


def model_identity(source: str) -> str:
    """A digest of the files of a model here: their names, sizes, first and last bytes.

    Of a workdir or checkpoint the files of the step that would be loaded. It is quick, and another
    training, export or quantization has another one.
    """
    place = resolve(source)
    root, steps = workdir_and_steps(epath.Path(place))
    folder = epath.Path(root) / "checkpoints" / str(max(steps)) if steps else epath.Path(place)
    digest = hashlib.sha256()
    for path in files_below(folder) if folder.is_dir() else [folder]:
        with path.open("rb") as file:
            head = file.read(_SAMPLE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _SAMPLE))
            digest.update(json.dumps([path.name, size]).encode() + head + file.read())
    return digest.hexdigest()


def ask_model(
    model: Callable[[], Model],
    requests: Sequence[Request],
    sampling: SamplingParams,
    cache: Cache,
    n_rows: int,
    *,
    attempts: int = 1,
    name: str = "",
) -> None:
    """Asks a model here for what the cache lacks; the model is loaded only then.

    Of several processes all compute, and the first one's cache counts.
    """
    lacks = np.asarray([cache.get(request.key) is None for request in requests])
    if jax.process_count() > 1:
        lacks = np.asarray(multihost_utils.broadcast_one_to_all(lacks))
    if not lacks.any():
        return
    chats = [request.chat(False) for request in requests]
    with tqdm(total=len(requests), initial=int((~lacks).sum()), desc=name, unit="reply") as bar:
        for attempt in range(1, attempts + 1):
            wanted = set(np.flatnonzero(lacks).tolist()).__contains__
            for i, reply in batched_replies(model(), chats, sampling, n_rows, wanted):
                fits = requests[i].readable(reply.text) or reply.finish == "too_long"
                if not fits and attempt < attempts:
                    chats[i] = [*chats[i], *asked_again(reply.text)]
                    continue
                lacks[i] = False
                bar.update()
                if not jax.process_index():
                    cache[requests[i].key] = reply._replace(attempts=attempt)


def recorded_answers(path: str, contestant: str) -> dict[str, str]:
    """The answers in a file of rows by the ids of their prompts; of several to one the first.

    A row has a prompt and one of `response`, `reply`, `output`, `completion`; of a row in the raw
    UltraFeedback schema the completion of the model that has the contestant's name counts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if no row has both.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"contestants.{contestant}.answers={path} is not a file")
    answers: dict[str, str] = {}
    for _, row in numbered_rows(Path(path)):
        question = first_question(row)
        text = _answer_of(row, contestant) if isinstance(row, dict) else None
        if question is not None and text is not None:
            answers.setdefault(prompt_digest(question), text)
    if not answers:
        raise ValueError(
            f"{path} has no row with a prompt and one of {', '.join(_ANSWERS)}, nor one with a "
            f"completion of the model {contestant}"
        )
    return answers


def completions_of(row: Row | str) -> list[Row]:
    """The completions of a row in UltraFeedback's schema, those with a response."""
    listed = row.get("completions") if isinstance(row, dict) else None
    listed = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [one for one in listed if isinstance(one.get("response"), str)]


def _answer_of(row: Row, contestant: str) -> str | None:
    named = (x["response"] for x in completions_of(row) if x.get("model") == contestant)
    return next(
        itertools.chain(named, (row[x] for x in _ANSWERS if isinstance(row.get(x), str))), None
    )


def answers_to(
    config: FeedbackConfig,
    prompts: Sequence[Prompt],
    requests: Mapping[str, Sequence[Request]],
    cache: Cache,
) -> tuple[list[Answered], dict[str, dict[str, Any]]]:
    """The prompts with at least one answer and their answers, and an account by contestant.

    Left out and counted: `missing` answers, `refused` and `empty` ones, and prompts that are
    `too_long` for the model.
    """
    contestants = config.contestants.items()
    recorded = {name: recorded_answers(x.answers, name) for name, x in contestants if x.answers}
    counts = {name: Counter[str]() for name in config.contestants}
    answered = []
    for i, prompt in enumerate(prompts):
        each = Answered(prompt, [], [])
        for name in config.contestants:
            stored = cache.get(requests[name][i].key) if name in requests else None
            text = stored.text if stored else recorded.get(name, {}).get(prompt.id)
            kind = "missing" if text is None else "answered" if text.strip() else "empty"
            if stored:
                kind = stored.finish if stored.finish in ("refused", "too_long") else kind
                counts[name] += Counter(tokens_in=stored.tokens[0], tokens_out=stored.tokens[1])
                counts[name]["cut_at_max_tokens"] += stored.finish == "length"
            counts[name][kind] += 1
            if text is not None and kind == "answered":
                each.contestants.append(name)
                each.texts.append(text)
        if each.texts:
            answered.append(each)
    accounts = {k: {x: n for x, n in count.items() if n} for k, count in counts.items()}
    if not answered:
        raise ValueError(f"no prompt has an answer: {accounts}")
    return answered, accounts
