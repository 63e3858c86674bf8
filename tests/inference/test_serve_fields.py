"""Fields of requests that change the reply: log-probs, grammars, penalties, ends."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import random_params
from starlette.testclient import TestClient
from test_generate import _forward, log_softmax
from test_serve import CHAT, GREEDY, content_of, events, served_model

import zephyr_jax as zj
from zephyr_jax.inference.server import Engine, make_app
from zephyr_jax.weights.huggingface import export_hf

TEXT = "the lorn is é and ½ of"
WORDS = {str(i): -100 for i in range(2, 259)}  # no end, no tokens that are a byte
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a b", "c"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(cfg, tok):
    # Rows of the head that are no token's, as in models whose vocabulary is rounded up.
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size + 4, num_hidden_layers=1)
    return cfg, random_params(cfg), tok


@pytest.fixture(scope="module")
def served(model):
    return served_model(*model, max_new_tokens=128)


@pytest.fixture(scope="module")
def client(served):
    with TestClient(make_app(Engine(served, 4))) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """The JSON of the response to a request."""

    def ask(path="chat/completions", **body):
        got = client.post(f"/v1/{path}", json=body)
        assert got.status_code == 200, got.text
        return got.json()

    return ask


def choice(response):
    (only,) = response["choices"]
    return only


def expected_logps(model, ids):
    """Log-probs of every token that follows the first ones of `ids`, by the full forward pass."""
    cfg, params, _ = model
    padded = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
    padded[0, : len(ids)] = ids
    return [log_softmax(row) for row in _forward(cfg, params, padded)[0, : len(ids)]]


def test_log_probs_of_a_chat_are_the_models(model, tok, ask):
    got = choice(ask(**GREEDY, logprobs=True, top_logprobs=3))
    content = got["logprobs"]["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert data.decode("utf-8", "replace") == got["message"]["content"]
    prompt = zj.render_chat(tok, CHAT, add_generation_prompt=True)[0]
    want, ids = expected_logps(model, prompt)[-1], list(prompt)
    for entry in content:
        best = np.argsort(-want[: tok.vocab_size])[:3]
        top = [e["logprob"] for e in entry["top_logprobs"]]
        assert entry["logprob"] == top[0]
        np.testing.assert_allclose(top, want[best], rtol=1e-4, atol=1e-5)
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        ids.append(int(best[0]))
        want = expected_logps(model, ids)[-1]
    assert choice(ask(**GREEDY))["logprobs"] is None


def test_sampled_and_changed_draws_report_the_models_own_log_probs(model, tok, ask):
    """Not those of the distribution behind temperature, bias, penalties and filters."""
    prompt = [tok.bos_id, *tok.encode(TEXT)]
    bias = WORDS | {"300": 9}
    changes = {"logit_bias": bias, "frequency_penalty": 1.5, "top_k": 5, "temperature": 2}
    got = choice(ask("completions", prompt=prompt, max_tokens=9, logprobs=2, seed=3, **changes))
    logprobs = got["logprobs"]
    by_text = {tok.decode([i], continuation=True): i for i in range(259, tok.vocab_size)}
    ids = [*prompt, *(by_text[text] for text in logprobs["tokens"])]
    want = expected_logps(model, ids)[len(prompt) - 1 :]
    for i, token in enumerate(ids[len(prompt) :]):
        got_logp = logprobs["token_logprobs"][i]
        np.testing.assert_allclose(got_logp, want[i][token], rtol=1e-4, atol=1e-5)
    assert got["text"] == "".join(logprobs["tokens"])
    offsets = np.cumsum([0, *map(len, logprobs["tokens"])])[:-1]
    assert logprobs["text_offset"] == offsets.tolist()


@pytest.mark.parametrize(("n_others", "max_tokens"), [(0, 0), (0, 1), (16, 1)])
def test_an_echoed_prompt_has_log_probs_as_lm_eval_reads_them(model, ask, n_others, max_tokens):
    _, _, tok = model
    ids = [tok.bos_id, *tok.encode(TEXT)]
    rows = [*([tok.bos_id, *tok.encode("is " * n)] for n in range(1, 1 + n_others)), ids]
    body = {"prompt": rows if n_others else TEXT, "max_tokens": max_tokens, "logprobs": 1}
    choices = ask("completions", temperature=0, echo=True, **body)["choices"]
    assert [c["index"] for c in choices] == list(range(len(rows)))
    for row, got in zip(rows, choices, strict=True):
        logprobs = got["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(row) + max_tokens}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert logprobs["tokens"][0] == "<s>"
        want = expected_logps(model, row)
        for i, token in enumerate(row[1:]):
            logp, top = logprobs["token_logprobs"][i + 1], logprobs["top_logprobs"][i + 1]
            np.testing.assert_allclose(logp, want[i][token], rtol=1e-4, atol=1e-5)
            best = want[i][: tok.vocab_size].argmax()
            assert (max(top.values()) == logp) == (best == token)  # what `acc` is made of
    assert choices[-1]["text"].startswith(TEXT)
    starts = choices[-1]["logprobs"]["text_offset"][1 : len(ids)]
    for start, text in zip(starts, choices[-1]["logprobs"]["tokens"][1:], strict=False):
        if not text.startswith("bytes:"):
            assert TEXT.startswith(text.lstrip(" " * (start == 0)), start)


def test_echoed_tokens_have_openais_form_and_bos_only_on_request(tok, ask):
    ids = [tok.bos_id, *tok.encode("語")]
    body = {"prompt": ids, "max_tokens": 0, "logprobs": 0, "echo": True}
    tokens = choice(ask("completions", **body))["logprobs"]["tokens"]
    assert tokens[-3:] == ["bytes:\\xe8", "bytes:\\xaa", "bytes:\\x9e"]
    alone = choice(ask("completions", **body | {"prompt": "is", "add_special_tokens": False}))
    assert alone["logprobs"]["tokens"] == [" is"]  # without BOS


def test_log_probs_are_streamed_with_their_tokens(client, ask):
    body = {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    whole = choice(ask("completions", **body))
    got = events(client.post("/v1/completions", json=body | {"stream": True}).text)
    parts = [event["choices"][0] for event in got]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        streamed = [x for part in parts if part["logprobs"] for x in part["logprobs"][name]]
        assert streamed == values
    chat = GREEDY | {"logprobs": True, "top_logprobs": 2}
    got = events(client.post("/v1/chat/completions", json=chat | {"stream": True}).text)
    parts = [event["choices"][0]["logprobs"] for event in got]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert streamed == choice(ask(**chat))["logprobs"]["content"]


def test_many_prompts_give_each_its_own_reply(ask):
    prompts = ["is " * n for n in range(1, 17)] + ["is "]
    body = {"max_tokens": 4, "seed": 5, "temperature": 1.2}
    got = ask("completions", prompt=prompts, **body)["choices"]
    ours = ask("completions", prompt=prompts[:2], **body)["choices"]
    assert [c["text"] for c in got[:2]] == [c["text"] for c in ours]
    assert [c["index"] for c in got] == list(range(17))
    assert got[16]["text"] != got[0]["text"]  # a number of its own


@pytest.mark.parametrize(("stream", "temperature"), [(False, 0), (True, 1.0)])
def test_replies_follow_a_json_schema(client, stream, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body = {"messages": CHAT, "response_format": form, "seed": 3, "stream": stream}
    got = client.post("/v1/chat/completions", json=body | {"temperature": temperature})
    value = json.loads(content_of(got.status_code, got.text, stream))
    assert list(value) == ["name", "kind", "age"]
    assert len(value["name"]) <= 6
    assert value["kind"] in ("a b", "c")
    assert 0 <= value["age"] <= 99


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[ab]{3}-\d"}, r"[ab]{3}-\d"),
        ({"choice": ["yes", 'no "é"']}, r'yes|no "é"'),
        ({"grammar": 'start: "x" | "y" start'}, r"y*x"),
        ({"json_object": True}, r"\{.*"),
        ({"json": '{"enum": [true, 5]}'}, "true|5"),
    ],
    ids=str,
)
def test_replies_follow_other_grammars(ask, form, pattern):
    body = {"messages": CHAT, "temperature": 1.3, "top_k": 0, "seed": 1, "n": 3, "max_tokens": 60}
    got = ask(**body, structured_outputs=form)["choices"]
    assert len(got) == 3
    for reply in got:
        text = reply["message"]["content"]
        assert re.fullmatch(pattern, text, re.DOTALL), text
        if reply["finish_reason"] == "stop" and "json_object" in form:
            assert isinstance(json.loads(text), dict)


def test_penalties_and_bias_are_those_of_generate(model, ask):
    settings = {"presence_penalty": 0.5, "frequency_penalty": 1.2, "repetition_penalty": 1.4}
    want = zj.generate(*model, [CHAT], max_new_tokens=12, logit_bias={40: 3.0}, **settings)[0]
    got = choice(ask(**GREEDY, logit_bias={"40": 3}, **settings))
    assert got["message"]["content"] == want
    assert want != choice(ask(**GREEDY))["message"]["content"]


def test_ends_are_those_of_the_request(tok, ask):
    greedy = GREEDY | {"logit_bias": WORDS}
    logprobs = choice(ask(**greedy, logprobs=True))["logprobs"]["content"]
    texts = [entry["token"] for entry in logprobs]
    by_text = {tok.decode([i], continuation=True): i for i in range(259, tok.vocab_size)}
    end = by_text[texts[4]]
    first = texts.index(texts[4])
    got = ask(**greedy, stop_token_ids=[end])
    ended = choice(got)
    assert (ended["message"]["content"], ended["finish_reason"]) == ("".join(texts[:first]), "stop")
    assert got["usage"]["completion_tokens"] == first + 1  # with the token that ended it
    later = choice(ask(**greedy, stop_token_ids=[end], min_tokens=8, logprobs=True))
    assert len(later["logprobs"]["content"]) >= 8
    assert end not in [by_text.get(e["token"]) for e in later["logprobs"]["content"][:8]]
    likely = {"logit_bias": {str(tok.eos_id): 100}}
    assert choice(ask(**GREEDY, **likely))["finish_reason"] == "stop"
    ignored = choice(ask(**GREEDY, **likely, ignore_eos=True, logprobs=True))
    assert [e["token"] for e in ignored["logprobs"]["content"]] == ["</s>"] * 12
    assert ignored["finish_reason"] == "length"
    stop = texts[0] + texts[1]
    late = choice(ask(**greedy, stop=[stop], min_tokens=3))
    assert late["message"]["content"].startswith(stop)


@pytest.mark.parity
def test_log_probs_equal_those_of_transformers_on_the_export(model, ask, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg, _, tok = model
    folder = export_hf(*model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [tok.bos_id, *tok.encode(TEXT * 3)]
    body = {"prompt": ids, "max_tokens": 0, "logprobs": 20, "echo": True}
    got = choice(ask("completions", **body))["logprobs"]
    with torch.inference_mode():
        want = theirs(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    for i, token in enumerate(ids[1:]):
        np.testing.assert_allclose(got["token_logprobs"][i + 1], want[i, token], atol=1e-4)
        top = sorted(got["top_logprobs"][i + 1].values(), reverse=True)[:5]
        likeliest = {}  # of tokens with one text, as of "1" and its byte, the likeliest is named
        for each in np.argsort(-want[i, : tok.vocab_size])[:12]:
            text = tok.decode([int(each)])
            likeliest.setdefault(each if "\ufffd" in text else text, want[i, each])
        np.testing.assert_allclose(top, [*likeliest.values()][:5], atol=1e-4)
    assert cfg.vocab_size > tok.vocab_size
