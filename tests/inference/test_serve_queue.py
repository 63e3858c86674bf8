"""Many clients at once, clients that leave, defects, and the command from start to end."""

import concurrent.futures
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import serve_case
from serve_case import GREEDY, LONG, ask, events, running

import zephyr_jax as zj
from zephyr_jax.inference.server import engine as serve_engine

greedy, model, served = serve_case.greedy, serve_case.model, serve_case.served


@pytest.mark.parametrize("stream", [False, True])
def test_fifty_at_once(served, greedy, stream):
    """One runs, eight wait, and each of the others hears at once that it has to come again."""
    go = threading.Barrier(50)

    def one(_):
        go.wait()
        return ask(port, GREEDY | {"stream": stream})

    with running(served, max_waiting=8) as (engine, port):
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(one, range(50)))
        assert engine.waiting == 0
    by_status = {status: sum(a[0] == status for a in answers) for status in (200, 429)}
    assert sum(by_status.values()) == 50
    assert by_status[200] >= 9
    assert by_status[429] > 0
    for status, headers, text in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(text)["error"]["code"] == "queue_full"
        elif stream:
            deltas = [e["choices"][0]["delta"] for e in events(text)]
            assert "".join(delta.get("content", "") for delta in deltas) == greedy
        else:
            assert json.loads(text)["choices"][0]["message"]["content"] == greedy


@pytest.fixture
def slow(monkeypatch):
    """Decoding takes 20 ms a token, and says how many there were when it was given up."""
    decode, ended = serve_engine.decode, []

    def slowly(*args, **settings):
        made = 0
        try:
            for new in decode(*args, **settings):
                made += 1
                yield new
                time.sleep(0.02)
        finally:
            ended.append(made)

    monkeypatch.setattr(serve_engine, "decode", slowly)
    return ended


def leave_after(port, body, ready):
    """A client that sends a request, waits for `ready` of its connection, and is gone."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    ready(connection)
    connection.close()


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_reply(served, slow, greedy, stream):
    with running(served) as (engine, port):
        ask(port, GREEDY | {"max_tokens": 2})  # compiles
        slow.clear()
        start = engine.made
        leave_after(
            port, LONG | {"stream": stream}, lambda _: until(lambda: engine.made > start + 5)
        )
        left = engine.made
        until(lambda: slow)
        assert slow[0] < 400
        assert engine.made - left <= 3  # the hang-up itself takes a moment
        status, _, text = ask(port, GREEDY)
        assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, greedy)


def test_a_client_that_leaves_the_queue_is_not_answered(served, slow):
    with running(served, max_waiting=2) as (engine, port):
        ask(port, GREEDY | {"max_tokens": 2})
        slow.clear()

        def first(_):
            until(lambda: engine.made > 3)
            for stream in (False, True):
                leave_after(
                    port, LONG | {"stream": stream}, lambda _: until(lambda: engine.waiting)
                )
                until(lambda: not engine.waiting)

        leave_after(port, LONG, first)
        until(lambda: slow)
        assert len(slow) == 1
        assert ask(port, GREEDY)[0] == 200


def test_a_defect_is_told_and_the_next_is_answered(served, monkeypatch, greedy):
    def broken(*_, **__):
        raise ZeroDivisionError("no")

    with running(served) as (_, port):
        with monkeypatch.context() as patch:
            patch.setattr(serve_engine, "decode", broken)
            status, _, text = ask(port, GREEDY)
            assert (status, json.loads(text)["error"]["type"]) == (500, "server_error")
            text = ask(port, GREEDY | {"stream": True})[2]
            assert json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]
            assert "[DONE]" not in text
        status, _, text = ask(port, GREEDY)
        assert json.loads(text)["choices"][0]["message"]["content"] == greedy


def test_few_programs_are_compiled(served):
    from zephyr_jax.inference import decoding

    def program(**change):
        with running(served) as (_, port):
            assert ask(port, GREEDY | change)[0] == 200
        return decoding._prefill._cache_size(), decoding._decode._cache_size()

    before = program(max_tokens=30)
    assert program(max_tokens=7) == before
    assert program(max_tokens=100) == before
    assert program(max_tokens=64, messages=[{"role": "user", "content": "so?"}]) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(model, tmp_path, greedy, number):
    folder = zj.export_hf(*model, tmp_path / "lorn")
    root = Path(__file__).parents[2]
    words = ["serve", f"--model={folder}", "--port=0", "--warm_up=64", "--host=127.0.0.1"]
    environment = os.environ | {"ZEPHYR_JAX_TOKEN": "secret", "PYTHONPATH": str(root)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    process = subprocess.Popen(
        [sys.executable, "-m", "zephyr_jax", *words], stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if "is ready" in line:
                break
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1 is ready", said[-1])[1])
        status, _, text = ask(port, GREEDY, Authorization="Bearer secret")
        assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, greedy)
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert rest.splitlines()[-1].endswith("stopped")
    assert "Traceback" not in rest
    assert re.search(r"chat: \d+ prompt and 12 new tokens in .* tok/s\)", rest)
    assert "compiled for prompts of up to 64 tokens" in "".join(said)
