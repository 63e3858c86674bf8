"""The tokenizers that tests use: one trained on the spot, and Mistral's where it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece

from zephyr_jax.data.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "stored"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "A user asks; the assistant answers in 2 or 3 sentences: Hello there!",
    "  indented text    with runs of blanks",
    "system user assistant </s> <s> <| |>",
)


def train_model(**changes: object) -> bytes:
    """A SentencePiece model of 420 tokens with the rules of Mistral's, but for `changes`."""
    options = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options |= {"allow_whitespace_only_pieces": True, "add_dummy_prefix": True}
    options |= {"character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2}
    options |= {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, **(options | changes)
    )
    return model.getvalue()


def mistral_tokenizer(version: str = "v1") -> Tokenizer:
    """Mistral-7B-v0.1's tokenizer, or a later one, from mistral-common; skips without it."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("mistral-common, which carries Mistral's tokenizer, is not installed")
    (path,) = (Path(found.origin).parent / "data").glob(f"*tokenizer*.model.{version}")
    return Tokenizer.from_file(path)


def golden(name: str) -> list[dict]:
    """The recorded cases in tests/data."""
    with open(DATA / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fuzz_texts(n: int, seed: int) -> list[str]:
    """Seeded strings: words, blanks, controls, emoji, many scripts, literal specials and tags."""
    rng = random.Random(seed)
    atoms = ["the", " the", "Hello", "def f(x):", "\n", "\n\n", "\t", "\r\n", " ", "  ", "   "]
    atoms += ["</s>", "<s>", "<unk>", "<|user|>", "<|assistant|>\n", "<", ">", "</", "s>", "▁"]
    atoms += ["😀", "👩\u200d👩\u200d👧", "🇩🇪", "é", "e\u0301", "ﬁ"]
    atoms += ["日本語", "ไทย", "Привет", "عربى"]
    atoms += ["\x00", "\x01", "\x1b[0m", "\x7f", "\ufffd", "\u200b", "\u3000", "\xa0", "<0x0A>"]
    atoms += ["12345", "3.14", "'s", "...", "!!!", "==", "//"]

    def atom() -> str:
        kind = rng.random()
        if kind < 0.75:
            return rng.choice(atoms)
        if kind < 0.8:
            return " " * rng.randrange(1, 40)
        low, high = rng.choice([(32, 127), (160, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)])
        return chr(rng.randrange(low, high))

    return ["".join(atom() for _ in range(rng.randrange(1, 14))) for _ in range(n)]
