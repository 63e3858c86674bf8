"""What the server refuses: bad requests, strangers, and flags that would let them in."""

import json
import signal

import openai
import pytest
import serve_case
from serve_case import CHAT, GREEDY, ask, client_of, running

from zephyr_jax.__main__ import main
from zephyr_jax.inference.server.http import MAX_BODY
from zephyr_jax.inference.server.requests import MAX_ROWS

client = serve_case.client
model = serve_case.model
port = serve_case.port
served = serve_case.served


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": ["hi"]}, "messages", "must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content of type NoneType"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "only parts of type text",
        ),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "=512"),
        ({"temperature": -1}, "temperature", "from 0"),
        ({"temperature": "warm"}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "to 1"),
        ({"top_k": 2.5}, "top_k", "whole number"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"n": MAX_ROWS + 1}, "n", f"to {MAX_ROWS}"),
        ({"seed": "x"}, "seed", "whole number"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": 5}, "stop", "a string or a list"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": 5}, "stream_options", "an object"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not served"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not served"),
        ({"logprobs": True}, "logprobs", "not served"),
        ({"tools": [{"type": "function"}]}, "tools", "not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
    ],
)
def test_bad_fields_are_named(port, change, param, said):
    for stream in (False, True):
        status, headers, text = ask(port, GREEDY | {"stream": stream} | change)
        error = json.loads(text)["error"]
        assert status == 400
        assert headers["content-type"] == "application/json"
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert said in error["message"]
        if said == "=512":
            assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [5, "a"], [[5, 380]], "a " * 600, [["a"]]])
def test_what_is_no_text_is_named(port, prompt):
    status, _, text = ask(port, {"prompt": prompt}, "/v1/completions")
    assert (status, json.loads(text)["error"]["param"]) == (400, "prompt")


def test_too_many_replies_at_once(port):
    status, _, text = ask(port, {"prompt": ["a"] * 9, "n": 2}, "/v1/completions")
    assert (status, json.loads(text)["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b" " * (MAX_BODY + 1), 413),
        ("POST", "/v1/chat/completions", {**GREEDY, "model": "gpt-4"}, 404),
        ("GET", "/v1/models/gpt-4", None, 404),
        ("POST", "/v1/embeddings", {}, 404),
        ("GET", "/v1/completions", None, 405),
    ],
)
def test_errors_have_openais_form(port, method, path, body, status):
    got, headers, text = ask(port, body, path, method)
    assert got == status
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert headers.get("allow") == ("POST" if status == 405 else None)


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="'lorn'") as error:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="lorn", messages=CHAT, presence_penalty=1)
    assert error.value.param == "presence_penalty"


def test_models_and_health(port, client):
    assert [model.id for model in client.models.list()] == ["lorn"]
    assert client.models.retrieve("lorn").id == "lorn"
    assert json.loads(ask(port, None, "/health", "GET")[2]) == {"status": "ok", "waiting": 0}


def test_a_token_and_origins(served):
    body = {**GREEDY, "max_tokens": 1}
    with running(served, token="secret", cors=["http://here"]) as (_, port):
        for sent in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            status, headers, text = ask(port, body, **sent)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
        assert ask(port, None, "/nowhere", "GET")[0] == 401
        assert ask(port, None, "/health", "GET")[0] == 200
        status, headers, _ = ask(port, body, Authorization="Bearer secret", Origin="http://here")
        assert (status, headers["access-control-allow-origin"]) == (200, "http://here")
        status, headers, _ = ask(port, body, Authorization="Bearer secret", Origin="http://there")
        assert headers["access-control-allow-origin"] is None
        with client_of(port) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_without_cors_no_origin_may(port):
    _, headers, _ = ask(port, None, "/health", "GET", Origin="http://here")
    assert headers["access-control-allow-origin"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0 can be reached from elsewhere"),
        (["--host=::"], "--host=:: can be reached"),
        (["--host=example.org"], "--host=example.org can be reached"),
        (["--token=a b"], "printable ASCII"),
        (["--port=70000"], "--port=70000"),
        (["--max_waiting=-1"], "--max_waiting=-1"),
        ([], "nowhere is not a model"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, monkeypatch, words, said):
    monkeypatch.delenv("ZEPHYR_JAX_TOKEN", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--model=nowhere", "--port=0", *words])
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert said in lines[0]
