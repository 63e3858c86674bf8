"""Answers of our models, replies of a judge behind an endpoint, and the files that hold either."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from tqdm import tqdm

from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.inference.decoding import cast_params
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import write_atomic
from zephyr_jax.weights.checkpoint import Model, params_digest

Row = dict[str, Any]
FACTS = ("digest", "settings")  # what our answers say of themselves, next to their format's columns
_RETRIES = 4  # of a request, by the client, which waits as long as Retry-After says
_PARALLEL = 8  # requests at a time
_HOPELESS = 10  # requests that fail, with none answered, until a judge is given up


def read_rows(
    path: str | os.PathLike[str], columns: Mapping[str, type], unique: Sequence[str] = ()
) -> list[Row]:
    """The objects in a file, one a line or in a list.

    Each has these columns with values of these types; a pair of objects that agree in all `unique`
    columns is an error. A ValueError names the row and the rule.
    """
    rows: list[Row] = []
    places: dict[tuple[Any, ...], str] = {}
    for number, row in numbered_rows(Path(path)):
        place = f"{path}:{number}"
        if isinstance(row, str):
            raise ValueError(f"{place} is no row ({row})")
        for name, kind in columns.items():
            if name not in row:
                raise ValueError(f"{place} lacks {name}; rows here have {', '.join(columns)}")
            if not isinstance(row[name], kind):
                raise ValueError(f"{place}: {name} must be of type {kind.__name__}: {row[name]!r}")
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
    write_atomic(path, text)


def batched_replies(
    model: Model, rows: Sequence[list[int]], sampling: SamplingParams, n_rows: int
) -> list[str]:
    """The replies to prompts given as ids, `n_rows` at a time, those of like length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    replies = [""] * len(rows)
    with tqdm(total=len(order), desc="answer", unit="prompt") as bar:
        for at in range(0, len(order), n_rows):
            batch = order[at : at + n_rows]
            own = dataclasses.replace(sampling, first_row=at)
            prompts = [rows[i] for i in batch]
            texts = generate(model.cfg, model.params, model.tokenizer, prompts, own)
            for i, text in zip(batch, texts, strict=True):
                replies[i] = text
            bar.update(len(batch))
    return replies


@dataclasses.dataclass(frozen=True)
class Answering:
    """How a model answers: the sampling, prompts at a time, the system message ("": none)."""

    sampling: SamplingParams
    n_rows: int
    system: str = ""

    def replies(self, model: Model, chats: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
        """The next reply to each chat, given as roles and contents; those of like length together.

        A sampled reply depends on the seed and on how many chats are shorter. A chat for which the
        model has too few positions gets an empty reply, and a warning says how many did.
        """
        cfg, tok = model.cfg, model.tokenizer
        model = model._replace(params=cast_params(cfg, model.params))
        before = [("system", self.system)] if self.system else []
        rows = []
        for chat in chats:
            messages = [{"role": role, "content": text} for role, text in [*before, *chat]]
            rows.append(prompt_ids(tok, messages))
        most = cfg.max_position_embeddings
        fitting = [i for i, row in enumerate(rows) if len(row) <= most]
        if long := len(rows) - len(fitting):
            logging.warning("%d prompts exceed the %d positions: empty replies", long, most)
        texts = batched_replies(model, [rows[i] for i in fitting], self.sampling, self.n_rows)
        replies = dict(zip(fitting, texts, strict=True))
        return [replies.get(i, "") for i in range(len(rows))]

    def facts(self, model: Model) -> dict[str, Any]:
        """What identifies these replies: the digest of the weights and the settings."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
        settings = {name: getattr(self.sampling, name) for name in names}
        settings |= {"dtype": model.cfg.dtype, "system": self.system}
        return {"digest": params_digest(model.params), "settings": settings}


class Verdict(NamedTuple):
    """A judge's reply, and the log-probs of the likeliest first tokens where it gives them."""

    text: str
    logprobs: dict[str, float]


class Judge:
    """A model behind an OpenAI-compatible endpoint; `failed` counts requests without a reply.

    The key is that of OPENAI_API_KEY, the address `base_url` or OPENAI_BASE_URL or OpenAI's own.
    """

    def __init__(self, name: str, base_url: str | None = None) -> None:
        try:
            self._openai = importlib.import_module("openai")
        except ModuleNotFoundError as error:
            message = "a judge needs the package openai: pip install openai"
            raise ModuleNotFoundError(message) from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self._key = os.environ.get("OPENAI_API_KEY", "")
        if not self._key and not base_url:
            raise ValueError(
                f"judge {name}: set OPENAI_API_KEY, or give the --base_url of an endpoint that "
                "needs no key"
            )
        self.name, self.failed = name, collections.Counter[str]()
        self._where = base_url or "OpenAI"
        self._reason = ""  # of the last status that was an error
        options = {"api_key": self._key or "none", "base_url": base_url, "max_retries": _RETRIES}
        self._client = self._openai.OpenAI(**options, timeout=120)

    def ask(
        self, requests: Sequence[list[dict[str, str]]], **options: Any
    ) -> Iterator[tuple[int, Verdict | None]]:
        """The number of each request and its verdict as they come; None for one that failed.

        Raises:
            ValueError: if the endpoint is down, refuses the key or the model, or answers nothing.
        """
        answered = 0
        with (
            ThreadPoolExecutor(_PARALLEL) as pool,
            tqdm(total=len(requests), desc="judge", unit="request") as bar,
        ):
            futures = {pool.submit(self._one, x, options): i for i, x in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    answered += isinstance(result, Verdict)
                    if isinstance(result, str):
                        self.failed[result] += 1
                        if not answered and self.failed.total() >= min(_HOPELESS, len(requests)):
                            reason = f"{dict(self.failed)} {self._reason}"
                            raise self._refusal("answers nothing", reason)
                    bar.update(1)
                    yield futures[future], result if isinstance(result, Verdict) else None
            finally:
                for future in futures:
                    future.cancel()

    def _one(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Verdict | str:
        """The verdict, or in a word why there is none."""
        openai = self._openai
        try:
            reply = self._client.chat.completions.create(
                model=self.name, messages=messages, temperature=0, **options
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refusal("refuses the key", error) from None
        except openai.NotFoundError as error:
            raise self._refusal("does not know the model", error) from None
        except openai.APIStatusError as error:
            self._reason = error.message
            return f"HTTP {error.status_code}"
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ == "ConnectError":
                raise self._refusal("cannot be reached", error.__cause__) from None
            return "timeout" if isinstance(error, openai.APITimeoutError) else "reply cut off"
        except (openai.OpenAIError, ValueError):
            return "reply not JSON"
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            return "reply without a choice"
        first = (getattr(choices[0].logprobs, "content", None) or [None])[0]
        tops = getattr(first, "top_logprobs", None) or []
        return Verdict(choices[0].message.content or "", {t.token: t.logprob for t in tops})

    def _refusal(self, what: str, why: object) -> ValueError:
        reason = str(why)
        if self._key:
            reason = reason.replace(self._key, "***")
        return ValueError(f"judge {self.name} at {self._where} {what}: {reason:.300}")
