"""A server with OpenAI's interface on loopback that answers, judges by a rule, and fails."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from judge_server import Cut, judge_server

Judge = Callable[[str, list[str]], list[int]]  # prompt, answers as shown -> ratings 1 to 5


class Script:
    """What the server does; `fault(n)` of the n-th request is None, or what goes wrong."""

    def __init__(self, judge: Judge | None = None, fault: Callable[[int], Any] | None = None):
        self.judge, self.fault = judge, fault or (lambda n: None)
        self.requests: list[dict[str, Any]] = []

    def reply(self, body: dict[str, Any]) -> str:
        """The text of the reply to a chat."""
        system, *_ = [m["content"] for m in body["messages"] if m["role"] == "system"] or [""]
        user = next(m["content"] for m in body["messages"] if m["role"] == "user")
        if "You rate" not in system:
            return f"{body['model']} says {user} {'long ' * (len(body['model']) % 5)}"
        prompt, *answers = re.split(r"\n\n\[Answer \d+\]\n", user)
        assert self.judge is not None
        most = 10 if "to 10" in system else 5
        ratings = [
            {"answer": i, "rationale": "Because.", "rating": str(r * most // 5), "types": []}
            for i, r in enumerate(self.judge(prompt.removeprefix("[Instruction]\n"), answers), 1)
        ]
        if body.get("response_format"):
            return json.dumps({"ratings": ratings})
        lines = [
            f"Answer {r['answer']}\nRating: {r['rating']}\nRationale: Because." for r in ratings
        ]
        return "\n\n".join(lines)


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """The base URL of the scripted server while the block runs."""
    faults: dict[Any, Any] = {
        "cut": Cut(b'{"id": "x", "choices": [{"mess'),
        "not_json": b"<html>busy</html>",
        "error_body": {"error": {"message": "overloaded"}},
        "garbled": "I would rather not.",
    }

    def reply(body: dict[str, Any], number: int) -> Any:
        script.requests.append(body)
        fault = script.fault(number)
        if fault == "silent":
            time.sleep(3)
        if isinstance(fault, dict):
            return fault["body"].encode("latin-1")
        return fault if isinstance(fault, tuple) else faults.get(fault) or script.reply(body)

    with judge_server(reply) as (url, _):
        yield url
