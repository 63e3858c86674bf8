"""Attacks a server while a good client asks: are its answers the same, and is memory flat?

python scripts/dev/hostile.py [--requests=1000] [--threads=8] [--most_mib=64]

Serves a tiny random model that it makes up, and sends it requests of every kind in `ATTACKS` over
bare sockets. Exit status 1 if an answer of the good client differs from its first one, an attack
ends otherwise than it says there or not within 300 s, the server ends, or its resident memory is at
the end more than `--most_mib` above what it was after the first hundred requests.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import zephyr_jax as zj
from zephyr_jax.demo import corpus

USER = [{"role": "user", "content": "what is the color of the lorn?"}]
GOOD = {"messages": USER, "temperature": 0, "max_tokens": 12}
LONG = GOOD | {"max_tokens": 200, "stream": True}
CLOSED, ANY = (0, 400, 403, 408, 413, 431), (200, 400, 429)  # statuses; 0: closed without one


def request(body: Any, *lines: str, kind: str = "application/json", n: Any = None) -> bytes:
    """A request with more headers, of bytes or of what is to become JSON; n: another length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    host = [] if any(x.startswith("Host") for x in lines) else ["Host: localhost"]
    own = (*host, f"Content-Type: {kind}", f"Content-Length: {len(data) if n is None else n}")
    first = "POST /v1/chat/completions HTTP/1.1"
    return "\r\n".join([first, *own, *lines, "", ""]).encode() + data


# Fields that are refused, and grammars, some of which may be answered
FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (10**9, -5, "1"),
    "max_tokens": (10**12, -5, 0.5),
    "temperature": (float("nan"), float("inf"), -1, 10**400),
    "stop": (["a"] * 17, ["a" * 10**6], [""], [[]], {"a": 1}),
    "logit_bias": ({"9" * 5000: 1}, {"-1": 1}, {"5": 10**9}),
    "messages": ([], "a", USER * 20_000, [[]], [USER[0] | {"content": "a" * 10**6}]),
    "x" * 10**5: (1,),
    "tools": ([{}] * 1000,),
    "model": ("x" * 10**6,),
}
GRAMMARS = {
    "regex": ("(a+)+" * 200, "(" * 50_000, "a{1,1000}{1,1000}", ".*" * 20_000),
    "grammar": ("start: start start | start", "start: " + "(" * 50_000),
    "json": ({"$ref": "#"}, {"type": "array", "minItems": 10**9}),
    "choice": (["a" * i for i in range(400)],),
}
GARBAGE = (b"\x16\x03\x01\x02\0\1", b"GET\r\n\r\n", b"\0" * 9999, b"BREW / HTTP/9.9\r\n\r\n")
BODIES = (b"[" * 200_000, b"\xff\xfe\0", b"", b"[]", b"null", b"{", b'{"a":' * 100_000)
BODIES += (
    b'{"a": ' + b"1" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
)
# What is sent, the statuses that may answer it, and how: the client reads the answer, ends its half
# of the connection, leaves at once or in the answer, waits before it reads, or sends slowly.
ATTACKS: list[tuple[bytes, tuple[int, ...], str]] = [
    *((data, CLOSED, "read") for data in GARBAGE),
    (request(b"fffffffffffffffff\r\n", "Transfer-Encoding: chunked"), CLOSED, "end"),
    *((request(b"", n=n), CLOSED, "end") for n in (-1, 10**30, "1, 2")),
    (request(GOOD, *[f"X-{i}: y" for i in range(20_000)]), CLOSED, "read"),
    (request(GOOD, "X: " + "y" * 10**6), CLOSED, "read"),
    (
        b"GET /v1/models/" + b"%2e%2e/" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        (404,),
        "read",
    ),
    (b"PUT /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,), "read"),
    *((request(GOOD, kind=x), (415,), "read") for x in ("text/plain", "multipart/form-data", "")),
    *((request(GOOD, f"{x}evil.example"), (403,), "read") for x in ("Origin: http://", "Host: ")),
    *((request(data), (400,), "read") for data in BODIES),
    (request(b" " * (5 << 20)), (0, 413), "read"),
    *((request(GOOD | {k: v}), (400, 404), "read") for k, values in FIELDS.items() for v in values),
    (request(GOOD), (0, 200, 429), "end"),
    (request(GOOD)[:400], (0,), "leave"),
    *[(request(LONG), (0,), "leave"), (request(LONG), (0, 200, 429), "leave in it")] * 6,
    *(
        (request(GOOD | {"structured_outputs": {kind: value}}), ANY, "read long")
        for kind, values in GRAMMARS.items()
        for value in values
    ),
    (request(LONG | {"n": 8, "logprobs": True, "top_logprobs": 20}), (0, 200, 429), "wait"),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\n", (0, 408), "send slowly"),
    (request(b"{", n=999), (0, 408), "send slowly"),
]


def exchange(port: int, data: bytes, manner: str = "read") -> bytes:
    """What answers these bytes before the connection is closed, or first of it."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=300)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        if manner == "end":
            connection.shutdown(socket.SHUT_WR)
        if manner in ("leave in it", "wait"):
            received = connection.recv(1 << 12)
            time.sleep(12 if manner == "wait" else 0)
        if manner.startswith("leave"):  # by a reset, as of a process that was killed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return received
        for _ in range(40 if manner == "send slowly" else 0):  # a blank every half second
            connection.sendall(b" ")
            time.sleep(0.5)
        while more := connection.recv(1 << 16):
            received += more
    return received


def status_of(received: bytes) -> int:
    """The status of an answer, 0 without one."""
    return int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else 0


def attack(port: int, number: int) -> str:
    """What is wrong with the answer to the attack of this number; "" if nothing is."""
    data, statuses, manner = ATTACKS[number % len(ATTACKS)]
    if manner.startswith("read"):
        data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    try:
        status = status_of(exchange(port, data, manner))
    except OSError as error:  # such as a timeout
        status = repr(error)
    return "" if status in statuses else f"{data[:90]!r}, {manner}: {status}, not of {statuses}"


def ask(port: int) -> str:
    """The good client's answer, which it asks for until the queue has room."""
    while status_of(received := exchange(port, request(GOOD, "Connection: close"))) == 429:
        time.sleep(0.05)
    try:
        body = received[received.index(b"{") : received.rindex(b"}") + 1]
        return json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError):
        return f"no answer: {received[:300]!r}"


def serve(root: Path) -> tuple[subprocess.Popen, int]:
    """A server of a tiny random model, and its port."""
    corpus.write_ultrachat(root / "raw", 60, 0)
    corpus.train_tokenizer(corpus.tokenizer_lines(root / "raw"), root / "tokenizer.model", 380)
    tok = zj.Tokenizer.from_file(root / "tokenizer.model")
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=tok.vocab_size)
    cfg = dataclasses.replace(cfg, max_position_embeddings=512)
    zj.export_hf(cfg, zj.init_params(cfg, jax.random.key(0)), tok, root / "model")
    words = [sys.executable, "-m", "zephyr_jax", "serve", f"--model={root / 'model'}", "--port=0"]
    process = subprocess.Popen(words, stderr=(root / "log").open("w"))
    while not (ready := re.search(r":(\d+)/v1 is ready", (root / "log").read_text())):
        if process.poll() is not None:
            raise RuntimeError((root / "log").read_text())
        time.sleep(0.2)
    return process, int(ready[1])


def main() -> None:
    """Attacks until all requests are sent; exit status 1 as the module's text says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--most_mib", type=float, default=64)
    args = parser.parse_args()
    process, port = serve(Path(tempfile.mkdtemp(prefix="hostile-")))
    first, took, wrong, done, memory = ask(port), [0.0], [], threading.Event(), []

    def good() -> None:
        while not done.wait(0.2):
            began = time.monotonic()
            wrong.extend([f"{x!r}, not {first!r}"] if (x := ask(port)) != first else [])
            took.append(time.monotonic() - began)

    client, began = threading.Thread(target=good), time.monotonic()
    client.start()
    with ThreadPoolExecutor(args.threads) as pool:
        results = pool.map(lambda i: attack(port, i), range(args.requests))
        for number, problem in enumerate(results, 1):
            wrong += [problem] if problem else []
            if number % 100 == 0 or number == args.requests:
                statm = Path(f"/proc/{process.pid}/statm").read_text()
                memory.append(int(statm.split()[1]) // 256)
    done.set()
    client.join()
    wrong += [] if process.poll() is None and ask(port) == first else ["the server has ended"]
    process.terminate()
    count = f"{args.requests} requests of {len(ATTACKS)} kinds in {time.monotonic() - began:.0f} s"
    answers = f"{len(took) - 1} good answers, median {statistics.median(took):.2f} s"
    sys.stdout.write("\n".join([*wrong[:20], f"{count}, {len(wrong)} wrong", ""]))
    sys.stdout.write(f"{answers}, at most {max(took):.2f} s; MiB after each hundred: {memory}\n")
    sys.exit(bool(wrong) or memory[-1] - memory[0] > args.most_mib)


if __name__ == "__main__":
    main()
