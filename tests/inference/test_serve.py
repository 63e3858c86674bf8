"""The server gives the model's replies: to OpenAI's client, to other programs, to many at once."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import select
import socket
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import uvicorn
from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.data.text.chat import render_text
from zephyr_jax.inference import decoding, replies
from zephyr_jax.inference import server as serving
from zephyr_jax.inference.replies import ServedModel
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.inference.server import Engine, make_app

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "dev"))

import hostile

CHAT = [{"role": "user", "content": "what is the color of the lorn?"}]
GREEDY = {"messages": CHAT, "temperature": 0, "max_tokens": 12}
LONG = {"messages": CHAT, "temperature": 0, "max_tokens": 400}
JSON = {"Content-Type": "application/json"}
WAITING = 4


@pytest.fixture(scope="module")
def model(cfg, tok):
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, num_hidden_layers=1)
    return cfg, random_params(cfg), tok


def served_model(cfg, params, tok, max_new_tokens=512):
    ends = (tok.eos_id, *cfg.end_ids)
    sampling = SamplingParams(temperature=0.7, max_new_tokens=max_new_tokens, stop_ids=ends)
    return ServedModel(cfg, decoding.cast_params(cfg, params), tok, "lorn", sampling)


@pytest.fixture(scope="module")
def served(model):
    return served_model(*model)


@pytest.fixture(scope="module")
def server(served):
    """An engine, and the port on which it is served."""
    engine = Engine(served, WAITING)
    options = {"log_config": None, "lifespan": "off", "http": serving.Connection}
    server = uvicorn.Server(uvicorn.Config(make_app(engine, local=True), **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # little waits unread
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield engine, listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(server):
    return server[1]


@pytest.fixture(scope="module")
def client(port):
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(model):
    return zj.generate(*model, [CHAT], max_new_tokens=12)[0]


@contextlib.contextmanager
def leaving(port, body):
    """A client that sends a request and disconnects at the end of the block."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        yield client


def post(port, body):
    """Status, headers and body as text, by the bare protocol."""
    with leaving(port, body) as client:
        response = client.getresponse()
        return response.status, response.headers, response.read().decode()


def events(text):
    """The JSON of server-sent events, which end with [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def content_of(status, text, stream):
    assert status == 200, text
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    choices = [event["choices"] for event in events(text)]
    return "".join(choice[0]["delta"].get("content", "") for choice in choices if choice)


def test_a_chat_gives_the_reply_of_generate(model, client, greedy):
    got = client.chat.completions.create(model="lorn", **GREEDY)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", greedy)
    assert choice.finish_reason == "length"
    n_prompt = len(zj.render_chat(model[2], CHAT, add_generation_prompt=True)[0])
    usage = got.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, 12)
    assert usage.total_tokens == n_prompt + 12


def test_a_warm_server_compiles_nothing_for_its_first_request(model, cache_events):
    cfg, params, tok = model
    short = dataclasses.replace(cfg, max_position_embeddings=70)
    engine = Engine(served_model(short, params, tok, max_new_tokens=8), WAITING)
    engine.warm_up()
    before = cache_events["compile_requests_use_cache"]
    assert before >= 2  # prefill and decoding
    for n in (5, 60):
        request = replies.GenerationRequest(True, [[7] * n], n, engine.served.sampling)
        assert [delta for step in replies.replies(engine.served, request) for delta in step]
    assert cache_events["compile_requests_use_cache"] == before


def test_a_stream_gives_the_same(client, greedy):
    *chunks, last = client.chat.completions.create(
        model="lorn", **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == greedy
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["length"]
    assert len(ends) > 5
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_the_rows_of_generate(model, client, stream):
    expected = zj.generate(*model, [CHAT] * 2, max_new_tokens=10, seed=7, temperature=1.3)
    settings = {"n": 2, "seed": 7, "max_completion_tokens": 10, "temperature": 1.3}
    got = client.chat.completions.create(model="lorn", messages=CHAT, stream=stream, **settings)
    texts = ["", ""]
    for part in got if stream else [got]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert texts == expected
    assert len(set(expected)) == 2


def test_stop_strings_end_a_reply(client, greedy):
    stop = greedy[5:7]
    settings = GREEDY | {"stop": ["\0", stop], "stream": True}
    parts = [*client.chat.completions.create(model="lorn", **settings)]
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == greedy[: greedy.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_completions_continue_a_text_without_the_template(model, client, tok):
    texts = ["the lorn", "a"]
    ids = [[tok.bos_id, *tok.encode(text)] for text in texts]
    settings = {"temperature": 1.3, "seed": 7}
    expected = zj.generate(*model, ids, max_new_tokens=9, **settings)
    for prompt in (texts, ids):
        got = client.completions.create(model="lorn", prompt=prompt, max_tokens=9, **settings)
        assert [choice.text for choice in got.choices] == expected
        usage = got.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (sum(map(len, ids)), 18)
    settings = {"model": "lorn", "prompt": texts[0], "temperature": 0}
    parts = [part.choices[0] for part in client.completions.create(stream=True, **settings)]
    expected = zj.generate(*model, ids[:1], max_new_tokens=16)[0]  # OpenAI's default
    assert "".join(part.text for part in parts) == expected
    assert parts[-1].finish_reason == "length"


def test_a_text_that_is_a_rendered_chat_gets_the_chats_reply(client, greedy):
    text = render_text(CHAT, add_generation_prompt=True)
    prompts = [text, f"<s>{text}"]
    got = client.completions.create(model="lorn", prompt=prompts, temperature=0, max_tokens=12)
    assert [choice.text for choice in got.choices] == [greedy] * 2


def test_of_many_requests_at_once_those_beyond_the_queue_get_429(server, greedy):
    engine, port = server
    go = threading.Barrier(20)

    def one(i):
        go.wait()
        return post(port, GREEDY | {"stream": bool(i % 2)})

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert engine.waiting == 0
    refused = [(headers, text) for status, headers, text in answers if status == 429]
    assert 0 < len(refused) <= 20 - 1 - WAITING
    for headers, text in refused:
        assert int(headers["retry-after"]) >= 1
        assert json.loads(text)["error"]["code"] == "queue_full"
    for i, (status, _, text) in enumerate(answers):
        if status != 429:
            assert content_of(status, text, i % 2) == greedy


@pytest.fixture
def slow(monkeypatch):
    """Decoding takes 20 ms a token; the list gets the number of steps of each ended decoding."""
    decode, ended = replies.decode, []

    def slowly(*args, **settings):
        steps = 0
        try:
            for chunk in decode(*args, **settings):
                steps += 1
                yield chunk
                time.sleep(0.02)
        finally:
            ended.append(steps)

    monkeypatch.setattr(replies, "decode", slowly)
    return ended


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_reply(server, slow, greedy, stream):
    engine, port = server
    post(port, GREEDY | {"max_tokens": 2})  # compiles
    slow.clear()
    start = engine.steps
    with leaving(port, LONG | {"stream": stream}):
        until(lambda: engine.steps > start + 5)
    left = engine.steps
    until(lambda: slow)
    assert slow[0] < 400
    assert engine.steps - left <= 3  # the disconnection itself takes a moment
    status, _, text = post(port, GREEDY)
    assert content_of(status, text, False) == greedy


def test_a_client_that_leaves_the_queue_is_not_answered(server, slow):
    engine, port = server
    start = engine.steps
    with leaving(port, LONG):
        until(lambda: engine.steps > start + 3)
        for stream in (False, True):
            with leaving(port, LONG | {"stream": stream}):
                until(lambda: engine.waiting)
            until(lambda: not engine.waiting)
    until(lambda: slow)
    assert len(slow) == 1
    assert post(port, GREEDY)[0] == 200


def test_a_defect_is_reported_and_the_next_request_is_answered(port, monkeypatch, greedy):
    def broken(*_, **__):
        yield from ()
        raise ZeroDivisionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(replies, "decode", broken)
        for stream in (False, True):
            status, _, text = post(port, GREEDY | {"stream": stream})
            assert (status, json.loads(text)["error"]["type"]) == (500, "server_error")
    status, _, text = post(port, GREEDY)
    assert content_of(status, text, False) == greedy


def answered(port, greedy):
    """Asks until the queue has room."""
    while True:
        status, _, text = post(port, GREEDY)
        if status != 429:
            return content_of(status, text, False) == greedy
        time.sleep(0.02)


def test_good_requests_are_answered_among_hostile_ones(server, greedy):
    engine, port = server
    quick = [i for i, (*_, how) in enumerate(hostile.ATTACKS) if how in ("read", "end")]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        good = [pool.submit(answered, port, greedy) for _ in range(3)]
        wrong = [*filter(None, pool.map(functools.partial(hostile.attack, port), quick))]
        assert all(future.result() for future in good)
    assert not wrong
    until(lambda: not engine.waiting)
    assert answered(port, greedy)


HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_client_that_sends_no_whole_headers_is_cut_off(port, monkeypatch, before):
    monkeypatch.setattr(serving, "SLOW_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(before + HEAD.encode())
        start, received = time.monotonic(), b"-"
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while received:  # a header now and then does not help
                received = connection.recv(1 << 16)
                connection.sendall(b"X: y\r\n")
        assert time.monotonic() - start < 10


def test_health_tells_of_a_stuck_device(server, monkeypatch):
    _, port = server
    go, decode = threading.Event(), replies.decode

    def stuck(*args, **settings):
        go.wait(20)
        yield from decode(*args, **settings)

    def health():
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status, json.load(response)

    assert health() == (200, {"status": "ok", "waiting": 0, "seconds_without_token": 0.0})
    monkeypatch.setattr(replies, "decode", stuck)
    monkeypatch.setattr(serving, "STUCK_SECONDS", 0.1)
    with leaving(port, LONG):
        until(lambda: health()[0] == 503)
    time.sleep(0.2)
    status, content = health()  # the client has left, the device is as it was
    go.set()
    assert (status, content["status"]) == (503, "stuck")
    assert content["seconds_without_token"] > 0.1
    until(lambda: health()[0] == 200)


def test_long_bodies_wait_for_their_turn(port, monkeypatch, greedy):
    monkeypatch.setattr(serving, "MAX_BODIES", 1 << 20)
    lengths = f"{HEAD}Content-Length: {1 << 20}\r\n\r\n{{".encode() + b" " * 700_000
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in "12"]
        for connection in held:
            connection.sendall(lengths)
        ready, _, _ = select.select(held, [], [], 20)
        assert ready[0].recv(1 << 16).startswith(b"HTTP/1.1 429")
        assert answered(port, greedy)


def test_a_client_that_sends_no_whole_body_is_cut_off(port, monkeypatch):
    monkeypatch.setattr(serving, "SLOW_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{HEAD}Content-Length: 99\r\n\r\n{{".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_frees_the_engine(server, slow, monkeypatch, greedy):
    _, port = server
    monkeypatch.setattr(serving, "SLOW_SECONDS", 0.5)
    body = LONG | {"stream": True, "n": 2, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        connection.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: slow)
    assert slow[0] < 400
    assert answered(port, greedy)
