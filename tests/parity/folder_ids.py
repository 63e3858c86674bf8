"""Ids of texts and of chats as the installed transformers gives them, for an exported folder.

Also run as a program, with the Python of another environment: JSON in, JSON out.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def folder_ids(folder: str, texts: list[str], chats: list[dict[str, Any]]) -> dict[str, Any]:
    """`texts` (ids of each, without BOS) and `chats` (ids by the folder's template).

    A chat is a dict with `messages` and `add_generation_prompt`.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = [
        tokenizer.apply_chat_template(chat.pop("messages"), return_dict=False, **chat)
        for chat in map(dict, chats)
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {"texts": encoded, "chats": rendered}


if __name__ == "__main__":
    json.dump(folder_ids(**json.load(sys.stdin)), sys.stdout)
