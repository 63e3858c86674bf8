"""The small world's tokenizer: a SentencePiece model that keeps every rule of Mistral's."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from zephyr_jax.storage import write_atomic

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def tokenizer_lines(*folders: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of raw UltraChat or UltraFeedback folders as a chat template renders them."""
    for folder in folders:
        for path in sorted(Path(folder).glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                turns = row.get("data")
                if turns is None:
                    best = max(row["completions"], key=lambda c: c["fine-grained_score"])
                    turns = [row["instruction"], best["response"]]
                yield ROLES[0]
                for i, text in enumerate(turns):
                    yield ROLES[1 + i % 2]
                    yield from text.splitlines()


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 768
) -> Path:
    """Writes a tokenizer.model and returns its path; the same texts give the same bytes.

    BPE with byte fallback, identity normalizer, dummy prefix, single digits, all spaces kept, and
    unk/bos/eos/pad at 0/1/2/-1. No token contains a newline. A ValueError if the texts have too few
    tokens for the vocabulary, or too many characters.
    """
    lines = [line for text in texts for line in text.splitlines() if line]
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
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
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} does not fit these texts: {error}") from None
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    model = proto.FromString(written.getvalue())
    model.normalizer_spec.add_dummy_prefix = True
    write_atomic(path, model.SerializeToString(deterministic=True))
    return Path(path)
