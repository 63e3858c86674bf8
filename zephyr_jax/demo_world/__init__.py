"""A little world to learn from, in the raw schemas of UltraChat and UltraFeedback."""

from __future__ import annotations

from zephyr_jax.demo_world.corpus import write_ultrachat, write_ultrafeedback
from zephyr_jax.demo_world.heldout import heldout_questions
from zephyr_jax.demo_world.vocabulary import tokenizer_lines, train_tokenizer

__all__ = [
    "heldout_questions",
    "tokenizer_lines",
    "train_tokenizer",
    "write_ultrachat",
    "write_ultrafeedback",
]
