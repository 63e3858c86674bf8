"""A server with OpenAI's interface on loopback that answers, judges by a rule, and fails."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Judge = Callable[[str, list[str]], list[int]]  # prompt, answers as shown -> ratings 1 to 5


class Script:
    """What the server does; `fault(n)` of the n-th request is None, or what goes wrong."""

    def __init__(self, judge: Judge | None = None, fault: Callable[[int], Any] | None = None):
        self.judge, self.fault = judge, fault or (lambda n: None)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.requests.append(body)
                script.headers.append(dict(self.headers))
                number = len(script.requests)
            fault = script.fault(number)
            if fault == "silent":
                time.sleep(3)
                return
            if fault == "cut":
                self._send(200, b'{"id": "x", "choices": [{"mess', length=400)
                self.close_connection = True
                return
            if fault == "not_json":
                self._send(200, b"<html>busy</html>", kind="text/html")
                return
            if fault == "error_body":
                self._send(200, b'{"error": {"message": "overloaded"}}')
                return
            if isinstance(fault, dict):
                self._send(200, fault["body"].encode("latin-1"))
                return
            if isinstance(fault, tuple):
                status, headers = fault
                error = json.dumps({"error": {"message": "no: Bearer " + self._key()}}).encode()
                self._send(status, error, headers=headers)
                return
            message = {"role": "assistant", "content": script.reply(body)}
            if fault == "garbled":
                message["content"] = "I would rather not."
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            self._send(200, json.dumps(whole | {"choices": [choice], "usage": usage}).encode())

        def _key(self) -> str:
            return self.headers.get("Authorization", "")

        def _send(
            self,
            status: int,
            body: bytes,
            *,
            kind: str = "application/json",
            length: int | None = None,
            headers: dict[str, str] | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length or len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
