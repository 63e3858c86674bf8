"""Requests to models here and behind endpoints, and a cache, so that nothing is asked twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.feedback.endpoints import Endpoint
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import files_below
from zephyr_jax.weights.checkpoint import Model
from zephyr_jax.weights.checksums import workdir_and_steps
from zephyr_jax.weights.sources import load_model, resolve

_SAMPLE = 1 << 16  # bytes at each end of a file that identify it, with its size
_AGAIN = "That could not be read. Rate every answer, in exactly the form that was asked for."


class Cache:
    """A SQLite file of JSON values. A value is on disk when `put` returns, whatever comes then."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS said (key TEXT PRIMARY KEY, value TEXT)")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path} is not a cache of this command ({error}); remove it"
            ) from error

    def get(self, key: str) -> Any:
        """The value of a key, None if there is none."""
        row = self._file.execute("SELECT value FROM said WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Stores a value."""
        text = json.dumps(value, ensure_ascii=False)
        self._file.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def content_key(*content: Any) -> str:
    """The key of what is asked: a SHA-256, in hex, of its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


class Request(NamedTuple):
    """A chat whose reply is wanted; it is stored as `text`, `finish` and number of `attempts`."""

    key: str  # of the cache
    messages: list[dict[str, str]]
    readable: Callable[[str], bool] = lambda _: True  # a reply that is not is asked for again
    schema: Any = None  # of the reply, for endpoints that take one

    def again(self, reply: str) -> Request:
        """The request after a reply that could not be read."""
        said = {"role": "assistant", "content": reply}
        more = [*self.messages, said, {"role": "user", "content": _AGAIN}]
        return self._replace(messages=more)


def ask_here(
    source: str,
    loaded: dict[str, Model],
    requests: Sequence[Request],
    sampling: SamplingParams,
    cache: Cache,
    batch_size: int,
    attempts: int = 1,
    name: str = "",
) -> None:
    """Asks a model here for what is missing in the cache; `loaded` keeps the model for later calls.

    Batches have prompts of about one length, and are the same whatever is missing, so that a round
    that was stopped ends with the replies of one that was not. All processes of a mesh compute each
    batch together, every device its rows; the first process stores it. A prompt that leaves no
    position for a reply gets an empty one that is `too_long`.
    """
    missing, pending = _missing_on_first_process(requests, cache), list(requests)
    if not missing:
        return
    if source not in loaded:
        loaded.clear()  # the earlier one is freed first
        loaded[source] = load_model(source)
    model = loaded[source]
    weights, most = (model.cfg, model.params, model.tokenizer), model.cfg.max_position_embeddings
    with tqdm(total=len(requests), desc=name, unit="reply") as bar:
        for attempt in range(1, attempts + 1):
            rows = [prompt_ids(model.tokenizer, request.messages) for request in pending]
            order = sorted(range(len(pending)), key=lambda i: (len(rows[i]), i))
            unread = []
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                texts = dict.fromkeys(batch, "")
                fitting = [i for i in batch if len(rows[i]) < most]
                if fitting and any(pending[i].key in missing for i in batch):
                    prompts = [rows[i] for i in fitting]
                    said = generate(*weights, prompts, sampling, first_row=start)
                    texts |= dict(zip(fitting, said, strict=True))
                for i in batch:
                    request, finish = pending[i], "stop" if i in fitting else "too_long"
                    if request.key not in missing:
                        continue
                    if i in fitting and not request.readable(texts[i]) and attempt < attempts:
                        unread.append(request.again(texts[i]))
                    elif not jax.process_index():
                        reply = {"text": texts[i], "finish": finish, "attempts": attempt}
                        cache.put(request.key, reply)
                bar.update(len(batch) if attempt == 1 else 0)
            pending = unread


def _missing_on_first_process(requests: Sequence[Request], cache: Cache) -> set[str]:
    """The keys that the first process lacks, whose cache counts."""
    lacks = [int(cache.get(request.key) is None) for request in requests]
    if jax.process_count() > 1:
        lacks = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(lacks))).tolist()
    return {request.key for request, lacking in zip(requests, lacks, strict=True) if lacking}


async def ask_endpoint(
    endpoint: Endpoint,
    model: str,
    requests: Sequence[Request],
    cache: Cache,
    attempts: int = 1,
    name: str = "",
    **settings: Any,
) -> None:
    """Asks an endpoint for what is missing in the cache; each reply is stored as it comes."""
    missing = [request for request in requests if cache.get(request.key) is None]
    done = len(requests) - len(missing)

    async def one(request: Request) -> None:
        key = request.key
        for attempt in range(1, attempts + 1):
            said = await endpoint.chat(model, request.messages, schema=request.schema, **settings)
            if said is None:  # the next call of the command asks again
                break
            if request.readable(said.text) or attempt == attempts:
                cache.put(key, {**said._asdict(), "attempts": attempt})
                break
            request = request.again(said.text)
        bar.set_postfix_str(str(endpoint.spending), refresh=False)
        bar.update()

    with tqdm(total=len(requests), initial=done, desc=name, unit="reply") as bar:
        await in_parallel(iter(missing), one, endpoint.config.concurrency)


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
