"""The server says what the model says: by OpenAI's client, and as other programs ask."""

import json
import shutil
import subprocess

import pytest
import serve_case
from serve_case import CHAT, GREEDY, ask, events

import zephyr_jax as zj
from zephyr_jax.data.text.chat import render_text
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.inference.server import engine as serve_engine
from zephyr_jax.inference.server.requests import Asked, Served, adds_bos, read

client = serve_case.client
greedy = serve_case.greedy
model = serve_case.model
port = serve_case.port
served = serve_case.served


def test_a_chat_gives_what_generate_gives(model, client, greedy):
    got = client.chat.completions.create(model="lorn", **GREEDY)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", greedy)
    assert choice.finish_reason == "length"
    n_prompt = len(zj.render_chat(model[2], CHAT, add_generation_prompt=True)[0])
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (n_prompt, 12)
    assert got.usage.total_tokens == n_prompt + 12
    assert got.object == "chat.completion"
    assert got.model == "lorn"


def test_a_stream_gives_the_same(client, greedy):
    options = {"include_usage": True}
    chunks = client.chat.completions.create(
        model="lorn", **GREEDY, stream=True, stream_options=options
    )
    *chunks, last = list(chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == greedy
    assert len(chunks) > 5
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_seeds_and_several_choices(model, client, stream):
    want = zj.generate(*model, [CHAT] * 2, max_new_tokens=10, seed=7, temperature=1.3)
    got = client.chat.completions.create(
        model="lorn", messages=CHAT, n=2, seed=7, max_completion_tokens=10, temperature=1.3,
        stream=stream,
    )  # fmt: skip
    texts = ["", ""]
    for part in got if stream else [got]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert texts == want
    assert len(set(want)) == 2


def test_what_a_request_says_counts_and_else_the_flags(served):
    served = served._replace(sampling=SamplingParams(temperature=0.7, top_k=50, top_p=0.95))
    said = {"temperature": 0.3, "top_k": -1, "min_p": 0.1, "seed": 2**32 + 5, "stop": "x"}
    asked = read({"messages": CHAT, "max_tokens": 5} | said, True, served)
    assert asked.sampling == SamplingParams(temperature=0.3, top_p=0.95, min_p=0.1)
    assert (asked.seed, asked.stop, asked.max_tokens) == (5, ("x",), 5)
    both = {"max_tokens": 5, "max_completion_tokens": 6}
    assert read({"messages": CHAT} | both, True, served).max_tokens == 6
    asked = read({"messages": CHAT, "temperature": None, "stop": None}, True, served)
    assert asked.sampling == served.sampling
    assert (asked.stop, asked.max_tokens) == ((), 512)


def test_without_a_seed_replies_differ(client):
    settings = {"messages": CHAT, "temperature": 1.5, "max_tokens": 12, "n": 2}
    got = [client.chat.completions.create(model="lorn", **settings).choices for _ in range(3)]
    assert len({choices[0].message.content for choices in got}) > 1


def test_stop_strings_and_the_end_of_text(model, client, greedy):
    stop = greedy[5:7]
    at = greedy.index(stop)
    for streamed in (False, True):
        got = client.chat.completions.create(
            model="lorn", **GREEDY, stop=["\0", stop], stream=streamed
        )
        parts = list(got) if streamed else [got]
        said = [(p.choices[0].delta if streamed else p.choices[0].message).content for p in parts]
        assert "".join(text or "" for text in said) == greedy[:at]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_the_end_of_text_ends_a_reply(model, served, client, monkeypatch):
    tok = model[2]
    prompt = zj.render_chat(tok, CHAT, add_generation_prompt=True)[0]
    asked = Asked(True, [prompt], len(prompt), 12, SamplingParams(), served.ends)
    fed = []
    stream = type(tok).stream
    monkeypatch.setattr(
        type(tok), "stream", lambda self, ids: stream(self, (fed.append(i) or i for i in ids))
    )
    list(serve_engine.replies(served, asked))
    assert len(fed) == 12
    end = fed[6]
    monkeypatch.setattr(Served, "ends", tuple(sorted({end, *served.ends})))
    got = client.chat.completions.create(model="lorn", **GREEDY)
    text = tok.decode(fed[: fed.index(end)], continuation=True)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (text, "stop")
    assert got.usage.completion_tokens == fed.index(end) + 1  # with the token that ended it


def test_texts_go_on_without_the_template(model, client):
    tok = model[2]
    texts = ["the lorn", "a"]
    ids = [[tok.bos_id, *tok.encode(text)] for text in texts]
    settings = {"temperature": 1.3, "seed": 7}
    want = zj.generate(*model, ids, max_new_tokens=9, **settings)
    for prompt in (texts, ids):
        got = client.completions.create(model="lorn", prompt=prompt, max_tokens=9, **settings)
        assert [choice.text for choice in got.choices] == want
        assert got.usage.prompt_tokens == sum(map(len, ids))
        assert got.usage.completion_tokens == 18
    settings = {"temperature": 0, "max_tokens": 9}
    want = zj.generate(*model, ids[:1], max_new_tokens=9)[0]
    for prompt in (texts[0], ids[0]):
        streamed = client.completions.create(model="lorn", prompt=prompt, stream=True, **settings)
        parts = [part.choices[0] for part in streamed]
        assert "".join(part.text for part in parts) == want
        assert parts[-1].finish_reason == "length"
    got = client.completions.create(model="lorn", prompt=texts[0], temperature=0)
    assert got.usage.completion_tokens == 16


def test_a_text_in_the_template_is_the_chat(client, greedy):
    """Special tokens that somebody rendered are tokens, and a BOS of the text's own is enough."""
    for lead in ("", "<s>"):
        text = lead + render_text(CHAT, add_generation_prompt=True)
        got = client.completions.create(model="lorn", prompt=text, temperature=0, max_tokens=12)
        assert got.choices[0].text == greedy


def test_content_in_parts_and_unknown_fields(port, greedy):
    parts = [{"type": "text", "text": CHAT[0]["content"]}]
    body = GREEDY | {"messages": [{"role": "user", "content": parts, "name": "me"}], "mirostat": 2}
    body |= {"presence_penalty": 0, "logit_bias": {}, "tools": None, "user": "u", "top_k": -1}
    status, _, text = ask(port, body)
    assert status == 200, text
    assert json.loads(text)["choices"][0]["message"]["content"] == greedy


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_gets_the_same(port, greedy):
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", "--max-time", "60", url]
    command += ["--noproxy", "*", "--header", "Content-Type: application/json", "--data"]

    def told(**more):
        body = json.dumps(GREEDY | more)
        return subprocess.run([*command, body], capture_output=True, text=True, check=True).stdout

    assert json.loads(told())["choices"][0]["message"]["content"] == greedy
    lines = told(stream=True).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas) == greedy


# What these programs are known to send.
OPEN_WEBUI = {"stream": True, "model": "lorn", "messages": CHAT, "max_tokens": 12,
              "stream_options": {"include_usage": True}, "temperature": 0}  # fmt: skip
LM_EVAL = {"model": "lorn", "max_tokens": 9, "temperature": 0, "stop": ["\n\n", "</s>"],
           "seed": 1234}  # fmt: skip
TEXT_WEBUI = {"model": "lorn", "messages": CHAT, "mode": "instruct", "max_tokens": 12, "top_k": 0,
              "temperature": 0, "min_p": 0, "repetition_penalty": 1, "stream": False,
              "seed": -1}  # fmt: skip
FASTCHAT = {"model": "lorn", "n": 1, "temperature": 0.0, "max_tokens": 12,
            "messages": [{"role": "system", "content": "Be kind."}, *CHAT]}  # fmt: skip


def test_requests_of_other_programs(model, port, greedy):
    parts = events(ask(port, OPEN_WEBUI)[2])
    deltas = [part["choices"][0]["delta"] for part in parts if part["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == greedy
    assert parts[-1]["usage"]["completion_tokens"] == 12
    tok = model[2]
    ids = [[tok.bos_id, *tok.encode("is it")]]
    got = json.loads(ask(port, LM_EVAL | {"prompt": ids}, "/v1/completions")[2])
    choices = sorted(got["choices"], key=lambda choice: choice["index"])
    want = zj.generate(*model, ids, max_new_tokens=9)
    assert [choice["text"] for choice in choices] == [text.split("\n\n")[0] for text in want]
    got = json.loads(ask(port, TEXT_WEBUI)[2])
    assert got["choices"][0]["message"]["content"] == greedy
    got = json.loads(ask(port, FASTCHAT)[2])
    want = zj.generate(*model, [FASTCHAT["messages"]], max_new_tokens=12)[0]
    assert got["choices"][0]["message"]["content"] == want
    # lm-eval's likelihoods: refused and not answered with something else
    body = {"model": "lorn", "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True}
    status, _, text = ask(port, body, "/v1/completions")
    assert (status, json.loads(text)["error"]["param"]) == (400, "logprobs")


def test_texts_begin_with_bos_where_the_tokenizers_files_have_it(model, tmp_path):
    path = zj.export_hf(*model, tmp_path / "hf") / "tokenizer.json"
    assert adds_bos(model[2])
    assert adds_bos(zj.Tokenizer.from_file(path))
    data = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(data))
    assert not adds_bos(zj.Tokenizer.from_file(path))
