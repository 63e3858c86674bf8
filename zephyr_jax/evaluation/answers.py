"""What judged benchmarks share: the model's answers, the judge's replies, and files of rows."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.evaluation import endpoints
from zephyr_jax.evaluation.endpoints import Cache, EndpointConfig, Messages, Reply, content_key
from zephyr_jax.inference.generate import generate_each, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import write_atomic
from zephyr_jax.weights.checkpoint import Model, params_digest
from zephyr_jax.weights.sources import load_in

FACTS = ("digest", "settings")  # what our answers say of themselves, next to their format's columns
_SAMPLING = ("max_new_tokens", "top_k", "top_p", "min_p", "seed")
_KEY = "OPENAI_API_KEY"


def read_rows(
    path: str | os.PathLike[str], columns: Mapping[str, Any], unique: Sequence[str] = ()
) -> list[Row]:
    """The objects in a file, one a line or in a list; a ValueError names a row that breaks a rule.

    Each has these columns with values of these types; one with a ? may be absent. No two agree in
    all `unique` columns, where no text is blank.
    """
    rows: list[Row] = []
    places: dict[tuple[Any, ...], str] = {}
    for number, row in numbered_rows(Path(path)):
        place = f"{path}:{number}"
        if isinstance(row, str):
            raise ValueError(f"{place} is no row ({row})")
        for column, kind in columns.items():
            name = column.removesuffix("?")
            if name not in row:
                if name != column:
                    continue
                raise ValueError(f"{place} lacks {name}; rows here have {', '.join(columns)}")
            if not isinstance(row[name], kind):
                wanted = getattr(kind, "__name__", kind)
                raise ValueError(f"{place}: {name} must be of type {wanted}: {row[name]!r}")
            if name in unique and kind is str and not row[name].strip():
                raise ValueError(f"{place} has an empty {name}; remove the row")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place} has half a surrogate pair; correct the row") from error
        key = tuple(json.dumps(row[name]) for name in unique)
        if unique and places.setdefault(key, place) != place:
            names = ", ".join(f"{name} {row[name]!r:.60}" for name in unique)
            raise ValueError(f"{place} repeats {names} of {places[key]}; keep one of the two")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes rows to a .json file as a list, to any other as a line each."""
    if Path(path).suffix == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text.encode(errors="replace"))  # judges write half a surrogate pair


def check_flags(args: argparse.Namespace, verdicts: str, judged: str) -> None:
    """Raises a ValueError if a flag lacks another; `verdicts` is the flag of the judge's file."""
    given = {name for name, value in vars(args).items() if value is not None}
    needs = {"model": ("questions", "answers"), "judge": ("answers", judged, verdicts)}
    needs |= {"baseline": ("judge",), "base_url": ("judge",)}
    if judged == "baseline":
        needs["questions"] = ("model",)
    for flag, others in needs.items():
        absent = [f"--{name}" for name in others if name not in given]
        if flag in given and absent:
            raise ValueError(f"--{flag} needs {' and '.join(absent)}")
    if given.isdisjoint({"model", "judge", verdicts}):
        raise ValueError(f"{args.kind} needs --model, --judge or --{verdicts}")
    if "limit" in given and given.isdisjoint({"model", "judge"}):
        raise ValueError("--limit needs --model or --judge")
    if {"model", verdicts} <= given and "judge" not in given:
        raise ValueError(f"--{verdicts} with --model needs --judge")
    paths: dict[Path, str] = {}
    for flag in ("questions", "answers", "baseline", verdicts, "output"):
        if flag not in given:
            continue
        value = Path(getattr(args, flag))
        read = flag in ("questions", "baseline") or (flag == "answers" and "model" not in given)
        if read and not value.exists():
            raise FileNotFoundError(f"--{flag}={value} does not exist")
        if (other := paths.setdefault(value.resolve(), flag)) != flag:
            raise ValueError(
                f"--{other} and --{flag} are both {value}; one would replace the other"
            )
    if "judge" in given:
        _endpoint(args)


class Answering:
    """The model of --model, which answers as the flags say; its replies are kept in the cache."""

    def __init__(self, args: argparse.Namespace, cache: Cache):
        self.name = args.name or Path(args.model).name
        self._args, self._cache, self._model = args, cache, load_in(args.model, args.dtype)
        self._digest = params_digest(self._model.params)
        settings = {name: getattr(args, name) for name in _SAMPLING}
        self._sampling = SamplingParams(**settings, temperature=args.temperature or 0.0)

    def replies(self, chats: Sequence[Messages], temperature: float | None = None) -> list[str]:
        """The next reply to each chat, empty to one that is too long, of which a warning tells."""
        sampling, cfg = self._sampling, self._model.cfg
        if temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=temperature)
        system = self._args.system
        before = [{"role": "system", "content": system}] if system else []
        full = [[*before, *chat] for chat in chats]
        decides = self._digest, cfg.dtype, dataclasses.asdict(sampling)
        keys = [content_key("answer", decides, i, chat) for i, chat in enumerate(full)]
        missing = {i for i, key in enumerate(keys) if self._cache.get(key) is None}
        how = sampling, self._args.rows, missing
        for i, reply in batched_replies(self._model, full, *how):
            self._cache[keys[i]] = reply
        replies = [self._cache.get(key) or Reply("", "") for key in keys]
        if long := sum(reply.finish == "too_long" for reply in replies):
            most = cfg.max_position_embeddings
            logging.warning("%d prompts exceed the %d positions: empty replies", long, most)
        return [reply.text for reply in replies]

    def facts(self) -> dict[str, Any]:
        """What identifies these replies: the digest of the weights and the settings."""
        settings = {name: getattr(self._sampling, name) for name in ("temperature", *_SAMPLING)}
        settings |= {"dtype": self._model.cfg.dtype, "system": self._args.system}
        return {"digest": self._digest, "settings": settings}


def write_answers(args: argparse.Namespace, answer: Callable[[Answering], list[Row]]) -> None:
    """Writes the answers of --model to --answers; what a killed command sampled is used again."""
    with contextlib.closing(Cache(Path(f"{args.answers}.cache"))) as cache:
        write_rows(args.answers, answer(Answering(args, cache)))
    logging.info("%s", args.answers)


def ask_judge(
    args: argparse.Namespace, path: Path, chats: Sequence[Messages], **settings: Any
) -> tuple[list[Reply | None], dict[str, int]]:
    """The judge's replies, None where one failed, and how many, by reason; kept next to `path`."""
    endpoint, spending = _endpoint(args), endpoints.Spending()
    settings |= {"model": args.judge, "temperature": 0}
    requests = [
        endpoints.Request(content_key(endpoint.url, settings, x), lambda _, own=x: own, settings)
        for x in chats
    ]
    asked = {"judge": endpoint}, {"judge": requests}
    with contextlib.closing(Cache(Path(f"{path}.cache"))) as cache:
        endpoints.ask_endpoints(*asked, cache, spending, name="judge")
        replies, failed = [cache.get(request.key) for request in requests], dict(spending.failed)
    if requests and not any(replies):
        raise ValueError(f"judge {args.judge} answered none of {len(requests)} requests: {failed}")
    return replies, failed


def _endpoint(args: argparse.Namespace) -> EndpointConfig:
    """Where --judge is; a ValueError if there is neither a key nor an address."""
    url = args.base_url or os.environ.get("OPENAI_BASE_URL")
    if not url and not os.environ.get(_KEY):
        raise ValueError(
            f"judge {args.judge}: set {_KEY}, or give the --base_url of an endpoint that needs none"
        )
    key = _KEY if os.environ.get(_KEY) else ""
    return EndpointConfig(url or "https://api.openai.com/v1", key)


def batched_replies(
    model: Model,
    chats: Sequence[Messages],
    sampling: SamplingParams,
    n_rows: int,
    wanted: set[int] | None = None,
    name: str = "sample",
) -> Iterator[tuple[int, Reply]]:
    """The number of each wanted chat and its reply, as they come, `n_rows` at a time.

    A sampled reply depends on its chat's number, not on the batches. One that has no position is
    empty: `too_long`.
    """
    cfg, tok = model.cfg, model.tokenizer
    rows = [prompt_ids(tok, chat) for chat in chats]
    numbers = sorted(range(len(rows)) if wanted is None else wanted)
    fitting = [i for i in numbers if len(rows[i]) < cfg.max_position_embeddings]
    yield from ((i, Reply("", "too_long")) for i in sorted({*numbers} - {*fitting}))
    if fitting:
        prompts = [rows[i] for i in fitting]
        texts = generate_each(cfg, model.params, tok, prompts, sampling, n_rows, numbers=fitting)
        for at, text in tqdm(texts, total=len(fitting), desc=name, unit="reply"):
            i, n = fitting[at], len(tok.encode(text))
            finish = "stop" if n < sampling.max_new_tokens else "length"
            yield i, Reply(text, finish, (len(rows[i]), n))
