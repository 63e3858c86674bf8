"""A small model behind sockets, and ways to ask it; tests name its fixtures as their own."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading

import openai
import pytest
import uvicorn
from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.inference.decoding import cast_params
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.inference.server.engine import Engine
from zephyr_jax.inference.server.http import make_app
from zephyr_jax.inference.server.requests import Served, adds_bos

CHAT = [{"role": "user", "content": "what is the color of the lorn?"}]
GREEDY = {"messages": CHAT, "temperature": 0, "max_tokens": 12}
LONG = {"messages": CHAT, "temperature": 0, "max_tokens": 400}


@pytest.fixture(scope="module")
def model(cfg, tok):
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, num_hidden_layers=1)
    cfg = dataclasses.replace(cfg, max_position_embeddings=512)
    return cfg, random_params(cfg), tok


@pytest.fixture(scope="module")
def served(model):
    cfg, params, tok = model
    drawing = SamplingParams(temperature=0.7)
    return Served(cfg, cast_params(cfg, params), tok, "lorn", adds_bos(tok), 512, drawing)


@contextlib.contextmanager
def running(served, max_waiting=32, **more):
    """An engine, and the port on which it is served."""
    engine = Engine(served, max_waiting)
    app = make_app(engine, **more)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=engine.run)]
        threads.append(threading.Thread(target=server.run, kwargs={"sockets": [listener]}))
        for thread in threads:
            thread.start()
        try:
            yield engine, listener.getsockname()[1]
        finally:
            server.should_exit = True
            threads[1].join()
            engine.close()
            threads[0].join()


@pytest.fixture(scope="module")
def port(served):
    with running(served) as (_, port):
        yield port


def client_of(port, **more):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, **more)


@pytest.fixture(scope="module")
def client(port):
    with client_of(port) as client:
        yield client


def ask(port, body, path="/v1/chat/completions", method="POST", **headers):
    """Status, headers and body as text, by the bare protocol."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def events(text):
    """The JSON of server-sent events, which end as they should."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.fixture(scope="module")
def greedy(model):
    return zj.generate(*model, [CHAT], max_new_tokens=12)[0]
