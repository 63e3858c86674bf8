"""The files of a tokenizer beside a model: read, written, and what they say of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

JSON_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME, SPECIALS_NAME = "chat_template.jinja", "special_tokens_map.json"
FILES = (JSON_NAME, CONFIG_NAME, TEMPLATE_NAME, SPECIALS_NAME)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The bytes of a tokenizer.json, under that name, and of the files beside it that exist.

    Raises:
        ValueError: if the chat template in them is none, or their configuration is no JSON.
    """
    path = epath.Path(path)
    paths = {JSON_NAME: path} | {name: path.with_name(name) for name in FILES[1:]}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    template_of(files, str(path.parent))  # said here, not when the first chat is rendered
    return files


def read_object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """The JSON object in one of the files; empty where there is no such file.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(
            f"{source}: {name} ({len(files[name])} bytes) is not JSON; copy or download it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {name} holds a {type(found).__name__}, not an object")
    return found


def template_of(files: Mapping[str, bytes], source: str) -> str:
    """The chat template in a model's files: the default one of several; "" where there is none.

    Raises:
        ValueError: if tokenizer_config.json is no JSON, or a template in the files is none.
    """
    if TEMPLATE_NAME in files:
        try:
            return files[TEMPLATE_NAME].decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source}: {TEMPLATE_NAME} is not UTF-8 ({error.reason} at byte {error.start}); "
                "copy or download it again"
            ) from error
    found = read_object(files, CONFIG_NAME, source).get("chat_template") or ""
    if isinstance(found, list):
        for i, named in enumerate(found):
            if not (isinstance(named, dict) and {"name", "template"} <= set(named)):
                raise ValueError(
                    f"{source}: entry {i} of chat_template in {CONFIG_NAME} is {named!r:.60}; "
                    "each entry is an object with name and template"
                )
        found = {str(named["name"]): str(named["template"]) for named in found}
    return found.get("default", "") if isinstance(found, dict) else str(found)


def named_tokens(files: Mapping[str, bytes], source: str) -> dict[str, str]:
    """What a chat template may call by name: `bos_token`, `eos_token` and their like."""
    named = read_object(files, SPECIALS_NAME, source)
    config = read_object(files, CONFIG_NAME, source)
    named |= {name: token for name, token in config.items() if token is not None}
    texts = {name: _content(token) for name, token in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text}


def tokenizer_object(files: Mapping[str, bytes], source: str) -> dict[str, Any]:
    """What tokenizer.json holds; the added tokens that the other files call special are so.

    Raises:
        KeyError: if it is JSON of another kind.
        ValueError: if a file is no JSON.
    """
    data = read_object(files, JSON_NAME, source)
    config = read_object(files, CONFIG_NAME, source)
    vocabulary = data["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: dict(token) for token in data.get("added_tokens") or ()}
    told = list((config.get("added_tokens_decoder") or {}).values())
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    more = more.values() if isinstance(more, dict) else more
    special = [*named_tokens(files, source).values(), *filter(None, map(_content, more))]
    for token in [*told, *({"content": text, "special": True} for text in special)]:
        text = token["content"]
        flags = {name: token[name] for name in _FLAGS if name in token}
        if text in added:
            added[text] |= flags
        elif text in vocabulary:  # what is in neither has no row in the model
            fresh = {"id": vocabulary[text], "content": text} | dict.fromkeys(_FLAGS, False)
            added[text] = fresh | flags
    return data | {"added_tokens": list(added.values())}


def _content(token: object) -> str | None:
    """The text of a special token, which is written plainly or with flags; None: no token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
