"""The files of a tokenizer.json: what they say of special tokens and of the chat template."""

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
    """The bytes of a tokenizer.json, under that name, and of the other files next to it.

    Raises:
        ValueError: if a chat template in them is not UTF-8, or their configuration is not JSON.
    """
    path = epath.Path(path)
    paths = {name: path.with_name(name) for name in FILES} | {JSON_NAME: path}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    template_of(files, str(path.parent))  # refused here, not when the first chat is rendered
    return files


def read_object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """The JSON object in one of the files, empty without it; a ValueError if it is none."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(
            f"{source}: {name} ({len(files[name])} bytes) is not JSON; copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: {name} holds a {type(content).__name__}, not an object")
    return content


def template_of(files: Mapping[str, bytes], source: str) -> str:
    """The chat template in a model's files: the default one of several; "" without any.

    Raises:
        ValueError: if it is not UTF-8, or tokenizer_config.json is not JSON or damaged.
    """
    if TEMPLATE_NAME in files:
        try:
            return files[TEMPLATE_NAME].decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source}: {TEMPLATE_NAME} is not UTF-8 ({error.reason} at byte {error.start}); "
                "copy or download it again"
            ) from error
    template = read_object(files, CONFIG_NAME, source).get("chat_template") or ""
    if isinstance(template, list):
        for i, entry in enumerate(template):
            if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
                raise ValueError(
                    f"{source}: entry {i} of chat_template in {CONFIG_NAME} lacks a name or a "
                    "template; copy or download it again"
                )
        template = {entry["name"]: entry["template"] for entry in template}
    return str(template.get("default") or "" if isinstance(template, dict) else template)


def named_tokens(files: Mapping[str, bytes], source: str) -> dict[str, str]:
    """What a chat template may call by name: `bos_token`, `eos_token` and their like."""
    named = read_object(files, SPECIALS_NAME, source)
    config = read_object(files, CONFIG_NAME, source)
    named |= {name: token for name, token in config.items() if token is not None}
    texts = {name: _content(token) for name, token in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text}


def tokenizer_object(files: Mapping[str, bytes], source: str) -> dict[str, Any]:
    """The content of tokenizer.json, with the special tokens of the other files marked as such.

    Raises:
        KeyError: if it is JSON of another kind.
        ValueError: if a file is not JSON.
    """
    data = read_object(files, JSON_NAME, source)
    config = read_object(files, CONFIG_NAME, source)
    vocabulary = data["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {text: i for i, (text, _) in enumerate(vocabulary)}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    more = more.values() if isinstance(more, dict) else more
    special = [*named_tokens(files, source).values(), *filter(None, map(_content, more))]
    changes = list((config.get("added_tokens_decoder") or {}).values())
    changes += [{"content": text, "special": True} for text in special]
    added = {token["content"]: dict(token) for token in data.get("added_tokens") or ()}
    for token in changes:
        text = token["content"]
        if text not in added and text in vocabulary:  # what is in neither has no row in the model
            added[text] = {"id": vocabulary[text], "content": text} | dict.fromkeys(_FLAGS, False)
        if text in added:
            added[text] |= {name: token[name] for name in _FLAGS if name in token}
    return data | {"added_tokens": list(added.values())}


def _content(token: object) -> str | None:
    """The text of a special token, which is written plainly or with flags; None: no token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
