"""The data of both runs: made-up dialogues and preference pairs, and a tokenizer of bytes.

All is a function of a seed: no trained tokenizer, whose vocabulary could differ by version.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from zephyr_jax.data.prepare.prepare import Selection, prepare

_THINGS = ("sun", "moon", "river", "hill", "lamp", "stone", "cloud", "gate", "wolf", "reed")
# Spelled as in the stored curves.
_COLOURS = ("red", "blue", "green", "grey", "gold", "pink", "brown")
_PLACES = ("the north", "the old town", "a dream", "winter", "my garden", "the far east")


def write_tokenizer(path: Path) -> Path:
    """A SentencePiece file without merges: three specials, the 256 bytes, and the blank."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made by protobuf
    kinds = model.SentencePiece
    named = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    named += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)] + [("▁", kinds.NORMAL)]
    for text, kind in named:
        model.pieces.add(piece=text, score=0.0, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(named)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def _said(rng: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and a worse one, all of several lengths."""
    thing, place = rng.choice(_THINGS), rng.choice(_PLACES)
    right = _COLOURS[(len(thing) + len(place)) % len(_COLOURS)]
    question = rng.choice(("what is the {} in {}?", "{} in {}?", "tell me of the {} in {}, please"))
    answer = rng.choice(("the {} is {}.", "it is {1}.", "the {} is {}, they say."))
    worse = rng.choice(("ask {2} about it", "who can say?", "no idea about the {0} in {2}"))
    parts = (thing, right, place)
    return question.format(thing, place), answer.format(*parts), worse.format(*parts)


def dialogues(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `messages`: one exchange, or two."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        messages = []
        for turn in range(1 + (number % 3 == 0)):
            question, answer, _ = _said(rng)
            asked = f"{number}. {question}" if not turn else question  # no two prompts are equal
            messages += [{"role": "user", "content": asked}]
            messages += [{"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def pairs(n: int, seed: int = 1) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        question, answer, worse = _said(rng)
        rows.append({"prompt": f"{number}. {question}", "chosen": answer, "rejected": worse})
    return rows


def make(root: Path, n_dialogues: int, n_pairs: int) -> None:
    """Writes `root/tokenizer.model` and prepares `messages/own` and `preferences/own`."""
    write_tokenizer(root / "tokenizer.model")
    rows = {"messages": dialogues(n_dialogues), "preferences": pairs(n_pairs)}
    for name, some in rows.items():
        path = root / "raw" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        prepare(name, path, root / "data", selection=Selection(holdout=0.03), workers=1)
