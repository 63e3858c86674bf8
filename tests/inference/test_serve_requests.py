"""What a request may ask: the server's settings that it overrides, and refusals by name."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import random_params
from starlette.testclient import TestClient

import zephyr_jax as zj
from zephyr_jax.data import tokenizer_files
from zephyr_jax.inference.generate import adds_bos
from zephyr_jax.inference.replies import ServedModel
from zephyr_jax.inference.requests import MAX_ROWS, Refusal, read
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.inference.server import Engine, make_app

CHAT = [{"role": "user", "content": "what is the color of the lorn?"}]
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}


@pytest.fixture(scope="module")
def served(cfg, tok):
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, num_hidden_layers=1)
    return ServedModel(cfg, {}, tok, "lorn", SamplingParams(temperature=0.7, stop_ids=(2,)))


@pytest.fixture(scope="module")
def client(served):
    with TestClient(make_app(Engine(served, 1))) as client:
        yield client


def refusal_of(body, served, chat=True):
    """The error of a request that is refused."""
    with pytest.raises(Refusal) as refused:
        read(body, chat, served)
    assert refused.value.status == 400
    return refused.value.error


def test_a_request_overrides_the_servers_sampling(served):
    own = dataclasses.replace(served.sampling, top_k=50, top_p=0.95)
    served = dataclasses.replace(served, sampling=own)
    body = {"temperature": 0.3, "top_k": -1, "min_p": 0.1, "seed": 2**32 + 5, "stop": "x"}
    request = read({"messages": CHAT, "max_tokens": 5} | body, True, served)
    changes = {"temperature": 0.3, "top_k": 0, "min_p": 0.1, "seed": 5, "stop": ("x",)}
    assert request.sampling == dataclasses.replace(own, max_new_tokens=5, **changes)
    both = {"max_tokens": 5, "max_completion_tokens": 6}
    assert read({"messages": CHAT} | both, True, served).sampling.max_new_tokens == 6
    nulls = {"temperature": None, "stop": None, "seed": None}
    request = read({"messages": CHAT} | nulls, True, served)
    assert dataclasses.replace(request.sampling, seed=0) == own


def test_a_text_begins_with_bos_if_the_tokenizers_files_add_it(served, tok, tmp_path):
    folder = zj.export_hf(served.cfg, random_params(served.cfg), tok, tmp_path / "hf")
    path = folder / "tokenizer.json"
    assert adds_bos(tok)
    assert adds_bos(zj.Tokenizer.from_file(path))
    data = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(data))
    assert not adds_bos(zj.Tokenizer.from_file(path))


def said(content):
    return [{"role": "user", "content": content}]


# Values of a field, and what their refusal says.
INVALID = {
    "messages": [
        ([], "at least 1 item"), ([{"role": "tool", "content": "x"}], "role 'tool'"),
        (said(None), "type NoneType"), (said("\ud800"), "surrogate"),
        (said([{"type": "x"}]), "be 'text'"), (said("a " * 600), "max_position_embeddings=512"),
        ([CALLING], "tool_calls is not supported"), (said("a") * 1001, "at most 1000 items"),
        ([{"role": "a" * 101, "content": ""}], "at most 100 characters"),
    ],
    "temperature": [(-1, "greater than or equal to 0"), ("1", "valid number")],
    "max_tokens": [(0, "at least 1")],
    "n": [(MAX_ROWS + 1, f"less than or equal to {MAX_ROWS}")],
    "stop": [
        ([""], "at least 1 character"), (5, "valid list"), (["x"] * 17, "at most 16 items"),
        ("x" * 1001, "at most 1000 characters"),
    ],
    "stop_token_ids": [([5] * 1001, "at most 1000 items")],
    "stream": [("yes", "valid boolean")],
    "presence_penalty": [(2.5, "less than or equal to 2")],
    "min_tokens": [(900, "from 0 to max_new_tokens=256")],
    "logit_bias": [
        ({"380": 1}, "no token id below 380"), ({"the": 1}, "valid integer"),
        ({"9" * 5000: 1}, "as an integer"),
    ],
    "top_logprobs": [(5, "needs logprobs=true"), (21, "less than or equal to 20")],
    "response_format": [({"type": "xml"}, "be 'text'"), ({"type": "json_schema"}, "schema")],
    "structured_outputs": [
        ({"json": {"type": "objec"}}, "Invalid type"), ({"regex": "(a"}, "unclosed group"),
        ({"json": {"$ref": "#"}}, "gives it up"), ({"grammar": "start: foo"}, "foo"),
        ({"json": False}, "not valid"),
        *(({"choice": choice}, "must be a list of texts") for choice in (5, [], "abc", {"a": 1})),
        ({"structural_tag": "x"}, "structural_tag"),
        ({"regex": "a", "choice": ["a"]}, "exclude each other"),
        ({"regex": "x" * 100_001}, "more than 100000 characters"),
    ],
    "guided_regex": [("a", "not supported here")],
    "x" * 60: [(1, "not supported here")],
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_field_is_named(served, name):
    for value, message in INVALID[name]:
        error = refusal_of({"messages": CHAT, name: value}, served)
        assert (error["param"], error["type"]) == (name, "invalid_request_error")
        assert message in error["message"]
        too_long = "max_position_embeddings" in error["message"]
        assert (error["code"] == "context_length_exceeded") == too_long


def test_a_grammar_that_takes_too_long_to_compile_is_refused(served, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "TRIAL_SECONDS", 1)
    schema = {"allOf": [{"type": "string", "pattern": f"a{i}.*b{i}"} for i in range(100)]}
    for fields in ({"regex": ".*" * 20_000}, {"json": schema}):
        error = refusal_of({"messages": CHAT, "structured_outputs": fields}, served)
        assert "it takes more than 1 seconds or 1 GiB" in error["message"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_that_cannot_fit_is_not_tokenized(served, monkeypatch, chat):
    most = 512 * served.longest

    def request(text):
        return {"messages": said(text)} if chat else {"prompt": text}

    tokenized = refusal_of(request("a" * most), served, chat)
    assert "tokens" in tokenized["message"]
    monkeypatch.setattr(type(served.tok), "encode", None)
    error = refusal_of(request("a" * (most + 1)), served, chat)
    assert f"a length of {most + 1} is" in error["message"]
    assert error["code"] == tokenized["code"] == "context_length_exceeded"


def test_fields_that_exclude_each_other_are_named(served):
    both = {"continue_final_message": True, "add_generation_prompt": True}
    grammar = {"structured_outputs": {"regex": "a"}, "ignore_eos": True}
    for fields in (both, grammar):
        assert "exclude each other" in refusal_of({"messages": CHAT} | fields, served)["message"]
    many = {"prompt": ["a"] * 65, "n": 2}
    assert "65 prompts times n=2 is above 128" in refusal_of(many, served, chat=False)["message"]


# What vLLM, llama.cpp, TGI or OpenAI act on, and this server does not.
REFUSED = {
    "tools": [{"type": "function"}], "tool_choice": "required", "modalities": ["text", "audio"],
    "web_search_options": {}, "reasoning_effort": "low", "chat_template": "x", "echo": True,
    "use_beam_search": True, "length_penalty": 2.0, "best_of": 4, "prompt_logprobs": 0,
    "skip_special_tokens": False, "repeat_penalty": 1.1, "do_sample": False, "temprature": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_served_is_refused_by_name(served, name):
    error = refusal_of({"messages": CHAT, name: REFUSED[name]}, served)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error["message"].startswith(f"{name}=")


HARMLESS = {
    "user": "me", "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": False,
    "tool_choice": "none", "tools": None, "functions": [], "modalities": ["text"], "audio": None,
    "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "best_of": 1, "suffix": "",
    "response_format": {"type": "text"}, "length_penalty": 1.0, "skip_special_tokens": True,
    "add_special_tokens": False, "mirostat": 0, "repeat_penalty": 1.0, "do_sample": True,
    "presence_penalty": 0, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "seed": -1,
    "max_tokens": -1, "structured_outputs": {}, "foo": None, "stream_options": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000", "Origin": "http://one"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "http://two"}, 403),
        ({"Host": "evil.example:8000"}, 403),  # a name that was made to resolve to this machine
        ({"Host": "localhost.evil.example"}, 403),
    ],
    ids=str,
)
def test_no_web_page_drives_a_server_of_this_machine_alone(served, headers, status):
    app = make_app(Engine(served, 1), cors=["http://one"], local=True)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        got = client.get("/v1/models", headers=headers)
    assert got.status_code == status
    if status == 403:
        assert got.json()["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_accepted(served):
    for empty in ({"logit_bias": []}, {"response_format": {}}, {"response_format": None}):
        read({"messages": CHAT} | empty, True, served)
    request = read({"messages": CHAT} | HARMLESS, True, served)
    assert dataclasses.replace(request.sampling, seed=0) == served.sampling
    plain = read({"messages": CHAT}, True, served)
    assert request._replace(sampling=plain.sampling) == plain
    seeds = {read({"messages": CHAT, "seed": -1}, True, served).sampling.seed for _ in range(3)}
    assert len(seeds) == 3  # -1 is a random one, as in vLLM and llama.cpp


BEGUN = [*CHAT, {"role": "assistant", "content": "it is"}]


def test_an_answer_that_is_begun_is_continued_or_not(served, tok):
    finished = zj.render_chat(tok, BEGUN)[0]
    continued = finished[: len(finished) - 1 - len(tok.encode("\n"))]
    new_turn = zj.render_chat(tok, BEGUN, add_generation_prompt=True)[0]
    asks, unfinished = "add_generation_prompt", "continue_final_message"
    for fields, want in (
        ({}, continued),
        ({unfinished: True}, continued),
        ({unfinished: True, asks: False}, continued),
        ({asks: True}, new_turn),
        ({unfinished: False}, new_turn),
        ({asks: False}, finished),
    ):
        assert read({"messages": BEGUN} | fields, True, served).rows == [want]


def test_any_message_is_continued_on_request_and_null_content_is_empty(served, tok):
    rows = read({"messages": CHAT, "continue_final_message": True}, True, served).rows
    assert tok.decode(rows[0]).endswith(CHAT[0]["content"])
    null = [*CHAT, {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}]
    want = zj.render_chat(tok, CHAT, add_generation_prompt=True)[0]
    assert read({"messages": null}, True, served).rows == [want]
    empty = [*CHAT, {"role": "assistant", "content": ""}, CHAT[0]]
    want = zj.render_chat(tok, empty, add_generation_prompt=True)[0]
    assert read({"messages": [*null, CHAT[0]]}, True, served).rows == [want]


def test_an_id_without_a_text_is_not_echoed(served, tok):
    cfg = dataclasses.replace(served.cfg, vocab_size=tok.vocab_size + 4)
    padded = dataclasses.replace(served, cfg=cfg)
    ids = [5, tok.vocab_size]
    assert read({"prompt": ids}, False, padded).rows == [ids]
    error = refusal_of({"prompt": ids, "echo": True}, padded, chat=False)
    assert f"token id {tok.vocab_size}" in error["message"]


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [5, "a"], [[5, 380]], "a " * 600, [["a"]]])
def test_an_invalid_prompt_is_refused(served, prompt):
    assert refusal_of({"prompt": prompt}, served, chat=False)["param"] == "prompt"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", {"messages": CHAT, "model": "gpt-4"}, 404),
        ("GET", "/v1/models/gpt-4", None, 404),
        ("POST", "/v1/embeddings", {}, 404),
        ("POST", "/v1/completions", {"prompt": "a"}, 415),
        ("GET", "/v1/completions", None, 405),
    ],
)
def test_errors_have_openais_form(client, method, path, body, status):
    content = body if isinstance(body, bytes) else json.dumps(body)
    kind = {"Content-Type": "text/plain" if status == 415 else "application/json"}
    got = client.request(method, path, content=content, headers=kind)
    assert got.status_code == status
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert got.headers.get("allow") == ("POST" if status == 405 else None)


def test_models_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get("/v1/models/lorn").json()
    assert (model["id"], model["max_model_len"]) == ("lorn", 512)
    got = client.get("/health", headers={"Origin": "http://one"})
    assert got.json() == {"status": "ok", "waiting": 0, "seconds_without_token": 0.0}
    assert "access-control-allow-origin" not in got.headers  # none without --cors


def test_an_api_key_and_origins(served):
    app = make_app(Engine(served, 1), token="secret", cors=["http://one"])
    key = {"Authorization": "Bearer secret"}
    with TestClient(app) as client:
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            got = client.get("/v1/models", headers=headers)
            assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer")
            assert got.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        for origin, allowed in (("http://one", "http://one"), ("http://two", None)):
            got = client.get("/v1/models", headers=key | {"Origin": origin})
            assert got.status_code == 200
            assert got.headers.get("access-control-allow-origin") == allowed


def test_bad_flags_are_one_line(refused, monkeypatch):
    monkeypatch.delenv("ZEPHYR_JAX_TOKEN", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    for word, message in {
        "--host=0.0.0.0": "--host=0.0.0.0 can be reached from other machines",
        "--port=70000": "--port=70000",
        "--max_waiting=-1": "--max_waiting: -1 must be at least 0",
        "--temperature=-1": "temperature=-1.0",
        "--token=schlüssel": "the token must be of printable ASCII characters",
        "--port=0": "nowhere is not a model",
    }.items():
        assert message in refused("serve", "--model=nowhere", "--port=0", word)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_the_command_serves_until_a_signal(served, tok, tmp_path, record_property):
    model = served.cfg, random_params(served.cfg), tok
    folder = zj.export_hf(*model, tmp_path / "lorn")
    root = Path(__file__).parents[2]
    words = ["serve", f"--model={folder}", "--port=0", "--host=127.0.0.1"]
    environment = os.environ | {"ZEPHYR_JAX_TOKEN": "secret", "PYTHONPATH": str(root)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    words = [sys.executable, "-m", "zephyr_jax", *words]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "is ready" in line:
                break
        url = re.search(r"(http://\S+/v1) is ready", lines[-1])[1] + "/chat/completions"
        body = {"messages": CHAT, "temperature": 0, "max_tokens": 12}
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
        assert text == zj.generate(*model, [CHAT], max_new_tokens=12)[0]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert rest.splitlines()[-1].endswith("stopped")
    assert "Traceback" not in rest
    assert re.search(r"chat: \d+ prompt and 12 new tokens in .* tok/s\)", rest)
    record_property("cell", ["serve", "SIGTERM", "status 0"])
