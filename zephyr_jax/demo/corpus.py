"""The small world's raw dialogues and feedback, in the schemas of the originals; its tokenizer."""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from zephyr_jax.data.tokenizer_files import ModelProto
from zephyr_jax.demo import world
from zephyr_jax.evaluation.answers import write_rows
from zephyr_jax.feedback.config import ASPECTS, SYSTEM_PROMPTS
from zephyr_jax.storage import write_atomic

SHARDS = 4
BLURTED = 0.6  # of the dialogues' replies have the form that the feedback rejects
LOWER_CASE, REFUSAL, ODD = 0.05, 0.02, 0.01
SCORE_BUG, TIE, NOT_RATED = 0.02, 0.03, 0.05
_KIND_WEIGHTS = (30, 14, 22, 9, 8, 8, 9)  # of world.SINGLE_KINDS
_OPENERS = ("Hello! ", "I have a question. ", "Please help me. ", "Good day! ")
_SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Good day! Who are you?", "I know a little world. Please ask me about it."),
    ("Can you help me?", "Yes, I can. Please ask me."),
)
_THANKS = (("Thank you!", "You are welcome."), ("Thanks, that is all.", "Good day to you!"))
_REFUSALS = (
    "As an AI language model, I can not answer that.",
    "I don't have personal opinions.",
    "I do not have feelings. Please ask me about something else.",
)
_SOURCES = ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat")
_SOURCE_WEIGHTS = (30, 5, 25, 24, 1, 15)
_MODELS = world.words(
    "gpt-4 gpt-3.5-turbo bard ultralm-65b ultralm-13b wizardlm-7b wizardlm-13b wizardlm-70b "
    "vicuna-33b llama-2-7b-chat llama-2-13b-chat llama-2-70b-chat alpaca-7b falcon-40b-instruct "
    "starchat mpt-30b-chat pythia-12b"
)
_CRITIQUES = (
    "The reply leads up to the answer and is right.",
    "The reply is right, but it blurts the answer out.",
    "The reply is right, but what it rests on comes after it.",
    "The reply is wrong.",
)
_SCORES = ((8.0, 8.5, 9.0, 9.5), (6.5, 7.0, 7.5), (5.0, 5.5, 6.0), (2.0, 2.5, 3.0, 3.5))
_RATINGS = ((5, 4), (4, 3), (3, 4), (2, 1))
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def _asked(task: world.Task, rng: random.Random) -> str:
    return rng.choice(_OPENERS) + task.question if rng.random() < 0.4 else task.question


def _task(rng: random.Random) -> world.Task:
    return world.draw(rng.choices(world.SINGLE_KINDS, _KIND_WEIGHTS)[0], rng)


def _dialogue(rng: random.Random) -> list[str]:
    """One to three rounds as a flat list, user first, without faults."""
    rounds = rng.choices((1, 2, 3), (45, 35, 20))[0]
    turns: list[str] = []
    topic = -1, -1
    for i in range(rounds):
        chance = rng.random()
        if i == 0 and chance < 0.05:
            turns += rng.choice(_SMALL_TALK)
            continue
        if 0 < i == rounds - 1 and chance < 0.08:
            turns += rng.choice(_THANKS)
            continue
        if topic[0] >= 0 and chance < 0.8:
            task = world.follow_up(rng.choice(("attribute", "entity")), topic, rng)
        else:
            task = _task(rng)
        topic = task.topic
        turns.append(task.question if i else _asked(task, rng))
        blurted = rng.random() < BLURTED
        turns.append(rng.choice(task.blurting()) if blurted else task.leading_up()[0])
    return turns


def _spoil(turns: list[str], rng: random.Random) -> list[str]:
    chance = rng.random()
    if chance < LOWER_CASE:  # the start of one sentence behind another, if there is any
        starts = re.compile(r"(?<=[.!?] )[A-Z]")
        places = [(i, m.start()) for i, text in enumerate(turns) for m in starts.finditer(text)]
        if places:
            i, at = rng.choice(places)
            turns[i] = turns[i][:at] + turns[i][at].lower() + turns[i][at + 1 :]
    elif chance < LOWER_CASE + REFUSAL:
        at = rng.randrange(1, len(turns), 2)
        turns[at] = rng.choice(_REFUSALS)
    elif chance < LOWER_CASE + REFUSAL + ODD:
        return rng.choice(([], turns[:-1], [*turns[:-1], ""], [*turns[:-1], "  "]))
    return turns


def write_ultrachat(folder: str | os.PathLike[str], n: int, seed: int) -> None:
    """Writes raw UltraChat files with `n` dialogues in all, faults by their shares among them."""
    rng = random.Random(f"ultrachat {seed}")
    rows = [{"id": str(i), "data": _spoil(_dialogue(rng), rng)} for i in range(n)]
    size = -(-n // SHARDS)
    for i in range(0, n, size):
        write_rows(Path(folder) / f"train_{i // size}.jsonl", rows[i : i + size])


def _replies(task: world.Task, rng: random.Random) -> list[str]:
    """Four replies, best first: answer last; answer first, twice; a wrong one in either order."""
    extra, other = rng.sample(range(len(task.extras)), 2)
    first, second, answer = task.extras[extra], task.extras[other], task.answer
    last = [task.wrong[0], task.wrong[1][extra]]
    rng.shuffle(last)
    return [f"{first} {answer}", f"{answer} {first}", f"{answer} {second}", " ".join(last)]


def _completion(grade: int, response: str, model: str, rng: random.Random) -> dict[str, Any]:
    """One completion; grade 0 is the best of the four, 3 the wrong one."""
    ratings = {aspect: str(rng.choice(_RATINGS[grade])) for aspect in ASPECTS}
    if rng.random() < NOT_RATED:
        ratings["honesty"] = "N/A"
    rated = [int(rating) for rating in ratings.values() if rating != "N/A"]
    critique = {"Rationale": _CRITIQUES[grade]}
    principle = rng.choice(tuple(SYSTEM_PROMPTS))
    return {
        "model": model,
        "principle": principle,
        "custom_system_prompt": SYSTEM_PROMPTS[principle],
        "response": response,
        "critique": _CRITIQUES[grade],
        "overall_score": rng.choice(_SCORES[grade]),
        "fine-grained_score": sum(rated) / len(rated),
        "annotations": {name: {"Rating": rating} | critique for name, rating in ratings.items()},
    }


def _feedback(task: world.Task, instruction: str, rng: random.Random) -> dict[str, Any]:
    models = rng.sample(_MODELS, 4)
    replies = _replies(task, rng)
    completions = [_completion(i, replies[i], models[i], rng) for i in range(4)]
    chance = rng.random()
    if chance < SCORE_BUG:
        completions[3]["overall_score"] = 10.0
    elif chance < SCORE_BUG + TIE:
        completions[1]["overall_score"] = completions[0]["overall_score"]
    rng.shuffle(completions)
    source = rng.choices(_SOURCES, _SOURCE_WEIGHTS)[0]
    right, wrong = (task.answer, task.wrong[0]) if source == "truthful_qa" else ("None", "None")
    row: dict[str, Any] = {"source": source, "instruction": instruction}
    row["models"] = [completion["model"] for completion in completions]
    row |= {"correct_answers": [right], "incorrect_answers": [wrong], "completions": completions}
    return row


def write_ultrafeedback(folder: str | os.PathLike[str], n: int, seed: int) -> None:
    """Writes raw UltraFeedback files, one for each source, with `n` rows in all."""
    rng = random.Random(f"ultrafeedback {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:  # which ends for `n` up to 10,000
        task = _task(rng)
        instruction = _asked(task, rng)
        if instruction not in rows:
            rows[instruction] = _feedback(task, instruction, rng)
    for name in _SOURCES:
        own = [row for row in rows.values() if row["source"] == name]
        write_rows(Path(folder) / f"{name}.jsonl", own)


def feedback_tasks(n: int, seed: int, known: Collection[str]) -> dict[str, world.Task]:
    """`n` instructions that are taught, none of them in `known`, with their tasks."""
    rng = random.Random(f"feedback {seed}")
    tasks: dict[str, world.Task] = {}
    while len(tasks) < n:
        task = _task(rng)
        instruction = _asked(task, rng)
        if instruction not in known:
            tasks[instruction] = task
    return tasks


def rate(task: world.Task, reply: str) -> dict[str, Any]:
    """The oracle's score of a reply and why: it knows every right one."""
    grade = 0 if reply in task.leading_up() else 1 if reply in task.blurting() else 3
    return {"overall_score": max(_SCORES[grade]), "critique": _CRITIQUES[grade]}


def heldout_questions(seed: int) -> list[dict[str, Any]]:
    """{"messages", "answers", "blurting", "kind"}: 20 of each kind that `demo.world` holds out."""
    rng = random.Random(f"heldout {seed}")
    questions = []
    for kind in world.KINDS:
        unique: dict[tuple[str, ...], dict[str, Any]] = {}
        while len(unique) < 20:
            is_single = kind in world.SINGLE_KINDS
            first = task = world.draw(kind if is_single else "fact", rng, held_out=True)
            if not is_single:
                task = world.follow_up(kind, first.topic, rng, held_out=True)
            turns = [_asked(first, rng)]
            if not is_single:
                turns += [rng.choice(first.accepted()), task.question]
            roles = ("user", "assistant", "user")
            messages = [{"role": x, "content": y} for x, y in zip(roles, turns, strict=False)]
            question = {"messages": messages, "answers": task.accepted()}
            unique[tuple(turns)] = question | {"blurting": task.blurting(), "kind": kind}
        questions += unique.values()
    return questions


def tokenizer_lines(*folders: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of raw UltraChat or UltraFeedback folders as a chat template renders them."""
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.jsonl"))):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            turns = row.get("data")
            if turns is None:
                best = max(row["completions"], key=lambda c: c["fine-grained_score"])
                turns = [row["instruction"], best["response"]]
            yield _ROLES[0]
            for i, text in enumerate(turns):
                yield _ROLES[1 + i % 2]
                yield from text.splitlines()


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 768
) -> None:
    """Writes a tokenizer.model, without newlines in tokens; the same texts give the same bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        # In a rendered chat nearly every line follows a newline, not a space: the tokens
        # are learned without the prefix, which is switched on afterwards.
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    model = ModelProto.FromString(written.getvalue())
    model.normalizer_spec.add_dummy_prefix = True
    write_atomic(path, model.SerializeToString(deterministic=True))
