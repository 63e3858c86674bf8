"""Sample replies of a run's checkpoints to prompts of its held-out split."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.documents import members
from zephyr_jax.data.prepare import prepare
from zephyr_jax.inference.generate import generate, prompt_ids
from zephyr_jax.models.parameters import count_params
from zephyr_jax.reports.page import Card, Page, Span, cut
from zephyr_jax.storage import is_remote, read_checked, write_checked
from zephyr_jax.weights.checkpoint import FOLDER, saved_steps
from zephyr_jax.weights.sources import find_tokenizer, load_model

FILE = "samples.json"
TOKENS = 64  # of a reply
LARGEST = 500_000_000  # parameters; replies of a larger model take too long


def write_samples(config: RunConfig, workdir: str | os.PathLike[str], n: int) -> None:
    """Writes `samples.json`: greedy replies to the first `n` held-out prompts, or why not."""
    root = epath.Path(workdir)
    steps, parameters = saved_steps(root), count_params(config.model)
    here = f"python -m zephyr_jax report {root} --samples={n}"
    chat = f"python -m zephyr_jax generate --model={root} --chat"
    large = f"The model has {parameters:,} parameters, more than {LARGEST:,}. Its replies: {chat}"
    split, n_processes, data = config.data.splits[1], jax.process_count(), config.data.data_dir
    reasons = {  # the first that holds
        f"None were requested (--samples={n}).": n < 1,
        "The run holds no split out, so there are no prompts (data.splits).": not split,
        "There is no checkpoint yet.": not steps,
        f"The run had {n_processes} processes. On one machine: {here}": n_processes > 1,
        large: parameters > LARGEST,
        f"The held-out records are in {data}, not on this machine.": is_remote(data),
    }
    reason = next((text for text, holds in reasons.items() if holds), "")
    write_checked(root / FILE, {"reason": reason} if reason else _samples(config, root, n, steps))


def _samples(config: RunConfig, root: epath.Path, n: int, steps: list[int]) -> dict[str, Any]:
    tok, room = find_tokenizer(root), config.model.max_position_embeddings - TOKENS
    every = _heldout(config)
    fitting = (prompt for prompt in every if len(prompt_ids(tok, prompt["messages"])) <= room)
    prompts = list(itertools.islice(fitting, n))
    if not prompts:
        return {"reason": f"No held-out prompt leaves {TOKENS} of the model's positions free."}
    messages, replies = [prompt["messages"] for prompt in prompts], {}
    for step in steps:
        logging.info("replies of step %d to %d held-out prompts", step, len(prompts))
        model = load_model(root / FOLDER / str(step), dtype=None)
        replies[str(step)] = generate(*model[:3], messages, max_new_tokens=TOKENS)
    return {"prompts": prompts, "replies": replies}


def _heldout(config: RunConfig) -> Iterator[dict[str, Any]]:
    split = config.data.splits[1]
    for member in members(config.data):
        for index, record in enumerate(prepare.read_split(member.folder, split)):
            turns = record.get("chosen") or record["messages"]
            answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            learned = [i for i in answers if turns[i].get("train", True)]
            end = answers[-1] if config.dpo else (learned or answers)[0]
            place = f"{member.name} {split}, record {index}"
            yield {"place": place, "messages": turns[:end], "answer": turns[end]["content"]}


def add_samples(page: Page, root: epath.Path) -> None:
    """Adds the replies in a run's `samples.json`, or why there are none."""
    how = f"Generate some: python -m zephyr_jax report {root} --samples=3"
    samples: dict[str, Any] = {"reason": how}
    if (root / FILE).is_file():
        samples = read_checked(root / FILE, f"remove it, and: {how}")
    if "replies" not in samples:
        page.text(samples["reason"], "missing")
        return
    page.text(
        f"Greedy, at most {TOKENS} tokens, of each checkpoint that is kept. The first "
        "prompts of the held-out split that leave room, not picked."
    )
    for at, prompt in enumerate(samples["prompts"]):
        page.text(prompt["place"], "soft")
        replies = [(f"step {step}", texts[at], "") for step, texts in samples["replies"].items()]
        replies.append(("the record's own answer", prompt["answer"], "dim"))
        add_replies(page, prompt["messages"], replies)


def add_replies(
    page: Page, messages: Sequence[Mapping[str, str]], replies: Sequence[tuple[str, str, str]]
) -> None:
    """Adds a prompt, and below it (title, text, style) of each reply side by side."""
    page.cards([Card(turn["role"], [Span(cut(turn["content"]))]) for turn in messages])
    texts = [(title, cut(text.strip()) or "(nothing)", style) for title, text, style in replies]
    page.cards([Card(title, [Span(text)], style) for title, text, style in texts], parallel=True)
