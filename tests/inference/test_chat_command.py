"""generate --chat: what is typed, and what is printed."""

import dataclasses
import json
import re

import pytest
from raw_rows import unfit

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.raw.dialogues import own_schemas
from zephyr_jax.inference import generate as generation
from zephyr_jax.inference.chat import read_lines
from zephyr_jax.inference.sampling import SamplingParams


class Model:
    """Stands in for stream: numbered answers, or those of `answers`; "!" is a Ctrl-C."""

    def __init__(self):
        self.prompts, self.settings, self.answers = [], [], []

    def __call__(self, cfg, params, tok, prompt, sampling):
        generation.check_ids(cfg, generation.prompt_ids(tok, prompt), "the chat")
        self.prompts.append(prompt)
        self.settings.append(sampling)
        return self.parts(self.answers.pop(0) if self.answers else f"answer {len(self.prompts)}")

    def parts(self, answer):
        for part in answer:
            if part == "!":
                raise KeyboardInterrupt
            yield part


@pytest.fixture
def fake(monkeypatch):
    fake = Model()
    monkeypatch.setattr(generation, "stream", fake)
    return fake


@pytest.fixture
def talk(hf_folder, monkeypatch, capsys):
    """Types lines, then Ctrl-D (or `end`), and returns what was printed."""

    def typed(*lines, end=EOFError, flags=()):
        left = iter(lines)

        def type_line(prompt):
            for line in left:
                return line
            raise end

        monkeypatch.setattr("builtins.input", type_line)
        main(["generate", f"--model={hf_folder}", "--chat", *flags])
        assert next(left, None) is None or "/quit" in lines
        return capsys.readouterr().out

    return typed


def contents(messages):
    return [message["content"] for message in messages]


def test_a_chat_prints_the_reply_of_generate(talk, hf_folder, tok):
    chat = [{"role": "user", "content": "Hello"}]
    expected = zj.generate(*zj.load_hf(hf_folder), tok, [chat], max_new_tokens=1)[0]
    out = talk("Hello", flags=["--max_new_tokens=1", "--temperature=0"])
    assert out == f"model: {expected}\n\n"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_history_empty_lines_the_system_message_and_the_end(talk, fake, end):
    lines = ("one", "", "   ", "two", "/system be  brief", "three", "/system -", "four")
    out = talk(*lines, flags=["--system=be kind"], end=end)
    assert out.startswith("model: answer 1\nmodel: answer 2\n(system message: be  brief)\n")
    assert out.endswith("(no system message)\nmodel: answer 4\n\n")
    assert contents(fake.prompts[1]) == ["be kind", "one", "answer 1", "two"]
    assert [contents(prompt)[0] for prompt in fake.prompts[2:]] == ["be  brief", "one"]


def test_turns_of_several_lines(talk, fake):
    talk('"""a', "", "  b", 'c"""', '"""', "/set x", '"""', '"""d"""', "//etc/passwd")
    assert contents(fake.prompts[-1])[::2] == ["a\n\n  b\nc", "/set x", "d", "/etc/passwd"]


def test_regenerate_takes_another_seed(talk, fake):
    out = talk("/regenerate", "one", "/regenerate", "two", flags=["--seed=5"])
    assert out.startswith("(there is no reply yet)\n")
    assert [settings.seed for settings in fake.settings] == [5, 6, 6]
    assert contents(fake.prompts[1]) == ["one"]
    assert contents(fake.prompts[2]) == ["one", "answer 2", "two"]
    fake.prompts.clear()
    assert "temperature 0" in talk("one", "/regenerate", flags=["--temperature=0"])
    assert len(fake.prompts) == 1


def test_undo_and_reset(talk, fake):
    out = talk("/undo", "one", "two", "/undo", "three", "/reset", "four")
    assert out.startswith("(0 of 256 positions are taken;")
    prompts = [contents(messages) for messages in fake.prompts]
    assert prompts[:2] == [["one"], ["one", "answer 1", "two"]]
    assert prompts[2:] == [["one", "answer 1", "three"], ["four"]]


def test_ctrl_c_stops_a_reply_and_keeps_its_beginning(talk, fake):
    fake.answers = ["half!", "!", "whole", "!"]
    out = talk("one", "two", "three", "/regenerate", "four")
    assert "model: half\n(stopped)\n" in out
    assert out.count("\n(stopped)\n(no text came; the conversation is unchanged)\n") == 2
    assert contents(fake.prompts[2]) == ["one", "half", "three"]
    assert contents(fake.prompts[4]) == ["one", "half", "three", "whole", "four"]


def test_settings(talk, fake):
    sets = ("/set temperature 0.2", "/set top_k 3", "/set stop ###", '/set stop "\\n"')
    out = talk(*sets, "one", "/set stop", "/set max_new_tokens 9", "two", "/set")
    first = SamplingParams(temperature=0.2, top_k=3, top_p=0.95, stop=("\n",))
    assert fake.settings[0] == first
    assert fake.settings[1] == dataclasses.replace(first, stop=(), max_new_tokens=9)
    assert out.endswith("min_p = 0.0\nseed = 0\nstop = ()\n\n")


def test_an_invalid_command_is_reported_and_changes_nothing(talk, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = {
        "/set temperature warm": "could not convert string to float: 'warm'",
        "/set temperature -1": "temperature=-1.0 must be at least 0",
        "/set warmth 1": "there is no setting warmth",
        '/set stop "': "Unterminated string",
        "/speak": "there is no /speak",
        "/load none.jsonl": "No such file",
        "/save x.jsonl": "a conversation to write",
        "\ud800": "surrogate",
    }
    out = talk(*lines, "one").splitlines()
    for line, message in zip(out, lines.values(), strict=False):
        assert line.startswith("(")
        assert message in line
    assert contents(fake.prompts[0]) == ["one"]
    assert fake.settings[0].temperature == 0.7
    assert not list(tmp_path.iterdir())


def test_help_names_every_command(talk, fake):
    out = talk("/help", "/quit", "one")
    commands = "help regenerate continue undo reset system save load set quit"
    assert re.findall(r"^/(\w+) +[A-Z].*\.$", out, re.MULTILINE) == commands.split()
    assert not fake.prompts


def test_save_and_load(talk, fake, tmp_path):
    path = tmp_path / "my chat.jsonl"
    fake.answers = ["é\u2028 "]
    out = talk("/system be kind", "one", f"/save {path}.1", "two", f"/save {path}")
    assert "exists; name another" in talk("one", f"/save {path}")
    assert all(f"(saved in {x})" in out for x in (path, f"{path}.1"))
    (line,) = path.read_text(encoding="utf-8").split("\n")[:-1]
    row = json.loads(line)
    assert contents(row["messages"]) == ["be kind", "one", "é\u2028 ", "two", "answer 2"]
    assert {x.name for x in tmp_path.iterdir()} == {path.name, f"{path.name}.1"}
    assert read_lines(path, [])[0].messages == row["messages"]  # as --prompts reads it
    assert unfit(own_schemas()["own"], row) is None  # as prepare_data.py reads it
    fake.prompts.clear()
    talk("/reset", f"/load {path}", "three", "/regenerate")
    assert contents(fake.prompts[0]) == [*contents(row["messages"]), "three"]


def test_a_file_is_not_replaced_and_must_hold_one_conversation(talk, fake, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("mine")
    assert f"{path} exists; name another" in talk("one", f"/save {path}")
    assert path.read_text() == "mine"
    fake.prompts.clear()
    path.write_text('{"prompt": "p"}\n\n{"messages": [{"role": "user", "content": "q"}]}\n')
    assert "has 2 conversations" in talk(f"/load {path}")
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    assert f"{path}:2 is not a line" in talk(f"/load {path}")
    path.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    assert talk(f"/load {path}", "/regenerate").startswith("(14 of 256 positions")
    assert contents(fake.prompts[0]) == ["q"]


def test_a_full_conversation_is_reported_and_nothing_is_dropped(talk, fake):
    long = "the lorn is blue " * 13
    out = talk("one", long, long, "/undo", "two")
    assert "has 292 tokens, the model max_position_embeddings=256; shorten it" in out
    assert contents(fake.prompts[1]) == ["one", "answer 1", long.strip()]
    assert contents(fake.prompts[2]) == ["one", "answer 1", "two"]
    fake.answers = ["x" * 230]
    assert re.search(r"\(2[3-5]\d of 256 positions are taken; /undo", talk("one"))


def test_a_chat_continues_a_loaded_answer(talk, fake, tmp_path):
    path, saved = tmp_path / "chat.jsonl", tmp_path / "saved.jsonl"
    question, begun = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am a"}
    path.write_text(json.dumps({"messages": [question, begun]}))
    fake.answers = [" model", "."]
    out = talk("/continue", f"/load {path}", "/continue", "/continue", f"/save {saved}")
    assert "there is no reply to continue" in out
    assert [contents(prompt)[-1] for prompt in fake.prompts] == ["I am a", "I am a model"]
    assert contents(json.loads(saved.read_text())["messages"])[-1] == "I am a model."
