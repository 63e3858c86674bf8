"""Questions that the corpus never asks."""

from __future__ import annotations

import random
from typing import Any

from zephyr_jax.demo import corpus, world

KINDS = (*world.SINGLE_KINDS, "attribute", "entity")


def heldout_questions(seed: int, per_kind: int = 20) -> list[dict[str, Any]]:
    """`per_kind` different questions of each of nine kinds: {"messages", "answers", "kind"}.

    `messages` ends with a user's turn; `answers` lists every reply that counts as exact. No
    question occurs in `write_ultrachat` or `write_ultrafeedback` of any size or seed: each is a
    combination that the rule in `zephyr_jax.demo.world` excludes, while every fact, phrasing, sum
    and word in it is taught in other combinations. In the two kinds of follow-up the first question
    is a held-out one too, so the conversation differs from all taught ones in both of its turns.

    Raises:
        ValueError: if a kind has fewer than `per_kind` held-out combinations.
    """
    rng = random.Random(f"heldout {seed}")
    questions = []
    for kind in KINDS:
        unique: dict[tuple[str, ...], dict[str, Any]] = {}
        for _ in range(50 * per_kind):
            if len(unique) == per_kind:
                break
            question = _question(kind, rng)
            unique[tuple(message["content"] for message in question["messages"])] = question
        else:
            raise ValueError(
                f"per_kind {per_kind} is more than kind {kind!r} has; ask for at most 20"
            )
        questions += unique.values()
    return questions


def _question(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind in world.SINGLE_KINDS:
        task = world.draw(kind, rng, held_out=True)
        turns = [corpus.opened(task.question, rng)]
    else:
        first = world.draw("fact", rng, held_out=True)
        task = world.follow_up(kind, first.topic, rng, held_out=True)
        turns = [corpus.opened(first.question, rng), rng.choice(first.accepted()), task.question]
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)
    ]
    return {"messages": messages, "answers": task.accepted(), "kind": kind}
