"""A few replies of each kept checkpoint of a run to prompts of its held-out split."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import mixture
from zephyr_jax.data.prepare import prepare
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.models.parameters import count_params
from zephyr_jax.storage import is_remote, write_atomic
from zephyr_jax.weights.checkpoint import find_tokenizer, load_model
from zephyr_jax.weights.checksums import FOLDER, saved_steps

FILE = "samples.json"
TOKENS = 64  # of a reply
LARGEST = 500_000_000  # parameters; of a larger model they are no small matter


def write_samples(config: RunConfig, workdir: str | os.PathLike[str], n: int) -> None:
    """Writes `samples.json`: greedy replies to the first `n` held-out prompts that fit the model.

    Where they would cost much or cannot be made the file says why. Nothing is made again that is
    there.

    Args:
        config: the run's.
        workdir: the run's folder.
        n: how many prompts; 0: none.

    Raises:
        ValueError: if a checkpoint is damaged.
        FileNotFoundError: if the prepared set is gone.
    """
    root = epath.Path(workdir)
    path, steps = root / FILE, saved_steps(root)
    said = _why_not(config, root, n, steps)
    made: dict[str, Any] = {"asked": n, "steps": steps, "tokens": TOKENS}
    if said:
        made["reason"] = said
    elif path.is_file() and json.loads(path.read_text()).items() >= made.items():
        return
    else:
        made |= _samples(config, root, n, steps)
    write_atomic(path, json.dumps(made, indent=1, ensure_ascii=False))


def _why_not(config: RunConfig, root: epath.Path, n: int, steps: list[int]) -> str:
    parameters = count_params(config.model)
    if not n:
        return "None were asked for (--samples=0)."
    if not steps:
        return "There is no checkpoint yet."
    if jax.process_count() > 1:
        return (
            f"The run had {jax.process_count()} processes. On one machine they are made by: "
            f"python -m zephyr_jax report {root} --samples={n}"
        )
    if parameters > LARGEST:
        return (
            f"The model has {parameters:,} parameters, more than {LARGEST:,}. Its replies: "
            f"python -m zephyr_jax generate --model={root} --chat"
        )
    if is_remote(config.data.data_dir):
        return f"The held-out records are in {config.data.data_dir}, not on this machine."
    return ""


def _samples(config: RunConfig, root: epath.Path, n: int, steps: list[int]) -> dict[str, Any]:
    tok = find_tokenizer(root)
    room = config.model.max_position_embeddings - TOKENS
    fitting = (
        (place, messages, answer)
        for place, messages, answer in _heldout(config)
        if len(prompt_ids(tok, messages)) <= room
    )
    prompts = list(itertools.islice(fitting, n))
    if not prompts:
        return {"reason": f"No held-out prompt leaves {TOKENS} of the model's positions free."}
    replies = {}
    for step in steps:
        logging.info("replies of step %d to %d held-out prompts", step, len(prompts))
        model = load_model(root / FOLDER / str(step), dtype=None)
        messages = [messages for _, messages, _ in prompts]
        texts = generate(model.cfg, model.params, tok, messages, max_new_tokens=TOKENS)
        replies[str(step)] = texts
    named = ("place", "messages", "answer")
    asked = [dict(zip(named, prompt, strict=True)) for prompt in prompts]
    return {"prompts": asked, "replies": replies}


def _heldout(config: RunConfig) -> Iterator[tuple[str, list[dict[str, str]], str]]:
    """Place, prompt and the record's own answer; of several sets in turn."""
    key = "chosen" if config.dpo else "messages"
    splits = {
        member.name: prepare.read_split(member.folder, config.data.eval_split)
        for member in mixture.members(config.data)
    }
    for index in range(max(map(len, splits.values()))):
        for name, split in splits.items():
            if index < len(split):
                turns = split[index][key]
                roles = [turn["role"] for turn in turns]
                end = len(roles) - 1 if config.dpo else roles.index("assistant")
                place = f"{name} {config.data.eval_split}, record {index}"
                yield place, list(turns[:end]), turns[end]["content"]
