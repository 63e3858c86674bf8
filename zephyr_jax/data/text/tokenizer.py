"""Which of the two kinds of tokenizer a file or a model's folder holds."""

from __future__ import annotations

import os

from absl import logging
from etils import epath

from zephyr_jax.data.text.base import Tokenizer
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.data.text.chat_template import renders_as_zephyr
from zephyr_jax.data.text.json_tokenizer import (
    JSON_NAME,
    JsonTokenizer,
    named_tokens,
    read_files,
    read_object,
    template_of,
)
from zephyr_jax.data.text.sentencepiece_tokenizer import FILE_NAME, SentencePieceTokenizer


def from_file(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a tokenizer.json (and the files next to it), or a SentencePiece file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a tokenizer, or one that breaks a rule of its kind.
    """
    path = epath.Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; name the file {FILE_NAME} or {JSON_NAME}")
    if path.suffix == ".json":
        return JsonTokenizer(read_files(path), str(path))
    return SentencePieceTokenizer(path.read_bytes(), str(path))


def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a model's folder.

    A tokenizer.model is taken where its chats are Zephyr's: next to no chat template, or next to
    one that renders what ours renders. Otherwise a tokenizer.json is taken, with its template. The
    errors are those of `from_file`.
    """
    folder = epath.Path(folder)
    model, fast = folder / FILE_NAME, folder / JSON_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder that could hold a {FILE_NAME}")
    if not model.is_file() and not fast.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {FILE_NAME} and no {JSON_NAME}; copy the tokenizer's files of "
            "the model that it was trained from into it"
        )
    if not model.is_file():
        return from_file(fast)
    files = read_files(fast)
    template = template_of(files, str(folder))
    if not fast.is_file():
        if template not in ("", CHAT_TEMPLATE):
            logging.warning(
                "%s has its own chat template, which needs a %s: Zephyr's is used",
                folder,
                JSON_NAME,
            )
        return from_file(model)
    try:
        tok = SentencePieceTokenizer(model.read_bytes(), str(model))
    except ValueError as error:
        logging.info("%s; taking %s", error, fast)
        return from_file(fast)
    added = read_object(files, JSON_NAME, str(folder)).get("added_tokens") or []
    entries = {tok.piece(i): i for i in range(tok.vocab_size)}
    absent = [t["content"] for t in added if entries.get(t["content"]) != t["id"]]
    if absent:
        logging.info("%s lacks %s; taking %s", model, ", ".join(absent[:3]), fast)
        return from_file(fast)
    names = tok.tokens | named_tokens(files, str(folder))
    zephyr = not template or renders_as_zephyr(template, names, tok.tokens)
    return tok if zephyr else from_file(fast)
