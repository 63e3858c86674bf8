"""The little world's tokenizer: a SentencePiece model that keeps every rule of Mistral's."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def tokenizer_lines(*folders: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of the raw corpus as the chat template would render them, without `</s>`.

    Args:
      *folders: folders of raw UltraChat or UltraFeedback jsonl files.
    """
    for folder in folders:
        for path in sorted(Path(folder).glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if "data" in row:
                    turns = row["data"]
                else:
                    best = max(row["completions"], key=lambda c: c["fine-grained_score"])
                    turns = [row["instruction"], best["response"]]
                yield ROLES[0]
                for i, text in enumerate(turns):
                    yield ROLES[1 + i % 2]
                    yield from text.splitlines()


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 768
) -> Path:
    """The path of the tokenizer.model that it writes.

    BPE with byte fallback, identity normalizer, dummy prefix, single digits, all spaces kept, and
    unk/bos/eos/pad at 0/1/2/-1. No piece contains a newline. The same texts give the same bytes.

    Args:
      texts: rendered text; it is cut into lines.
      path: where the model goes.
      vocab_size: pieces in all, of which 259 are the bytes, `<unk>`, `<s>` and `</s>`.

    Raises:
      ValueError: if the texts have too few pieces for the vocabulary, or too many characters.
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
            # In a rendered chat nearly every line follows a newline, not a space: the pieces are
            # learnt as they stand there, and the prefix is switched on afterwards.
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
    assert not any("\n" in piece.piece for piece in model.pieces)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(model.SerializeToString(deterministic=True))
    part.replace(target)
    return target
