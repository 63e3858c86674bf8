"""generate --chat: what is typed and what is said."""

import dataclasses
import json
import re

import pytest
from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.raw.dialogues import own_schemas
from zephyr_jax.inference import chat as chat_command
from zephyr_jax.inference import generate as generation
from zephyr_jax.inference.prompt_files import read_lines


@pytest.fixture(scope="module")
def model(cfg, tok, tmp_path_factory):
    """A small random model with 256 positions as a Hugging Face folder."""
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, max_position_embeddings=256)
    cfg = dataclasses.replace(cfg, num_hidden_layers=1)
    return zj.export_hf(cfg, random_params(cfg), tok, tmp_path_factory.mktemp("model") / "hf")


class Model:
    """What stands in for generate: it says what it was asked, or stops in the middle."""

    def __init__(self):
        self.asked, self.settings, self.answers = [], [], []

    def __call__(self, cfg, params, tok, prompts, *, on_text=None, **settings):
        self.asked.append(prompts[0])
        self.settings.append(settings)
        answer = self.answers.pop(0) if self.answers else f"answer {len(self.asked)}"
        answer = answer() if callable(answer) else answer
        for piece in answer:
            if piece == "!":
                raise KeyboardInterrupt
            on_text(piece)
        return [answer]


@pytest.fixture
def fake(monkeypatch):
    fake = Model()
    monkeypatch.setattr(generation, "generate", fake)
    return fake


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Types lines, then Ctrl-D (or what `end` is); what was printed."""

    def typed(*lines, end=EOFError, flags=()):
        said = iter(lines)

        def ask(prompt):
            for line in said:
                if line is KeyboardInterrupt:
                    raise line
                return line
            raise end

        monkeypatch.setattr("builtins.input", ask)
        main(["generate", f"--model={model}", "--chat", *flags])
        assert next(said, None) is None or "/quit" in lines
        return capsys.readouterr().out

    return typed


def contents(messages):
    return [message["content"] for message in messages]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_ends_quietly(talk, fake, end):
    assert talk("Hello", end=end) == "model: answer 1\n\n"


def test_a_chat_says_what_generate_says(talk, model):
    loaded = zj.load_hf(model)
    tok = zj.Tokenizer.from_folder(model)
    chat = [{"role": "user", "content": "Hello"}]
    want = zj.generate(*loaded, tok, [chat], max_new_tokens=3)[0]
    assert talk("Hello", flags=["--max_new_tokens=3", "--temperature=0"]) == f"model: {want}\n\n"


def test_history_and_empty_lines(talk, fake):
    out = talk("one", "", "   ", "two", flags=["--system=be kind"])
    assert out == "model: answer 1\nmodel: answer 2\n\n"
    assert contents(fake.asked[1]) == ["be kind", "one", "answer 1", "two"]
    roles = [message["role"] for message in fake.asked[1]]
    assert roles == ["system", "user", "assistant", "user"]


def test_turns_of_several_lines(talk, fake):
    talk("one\\", "two\\", "three", '"""a', "", "  b", 'c"""', '"""', "/set x", '"""', '"""d"""')
    said = ["one\ntwo\nthree", "a\n\n  b\nc", "/set x", "d"]
    assert contents(fake.asked[-1])[::2] == said


def test_system(talk, fake):
    out = talk("/system", "/system be  brief", "one", "/system -", "two")
    assert out.startswith("(no system message)\n(system message: be  brief)\n")
    assert contents(fake.asked[0]) == ["be  brief", "one"]
    assert contents(fake.asked[1]) == ["one", "answer 1", "two"]


def test_regenerate_takes_another_seed(talk, fake):
    out = talk("/regenerate", "one", "/regenerate", "two", flags=["--seed=5"])
    assert out.startswith("(there is no reply yet)\n")
    assert [settings["seed"] for settings in fake.settings] == [5, 6, 6]
    assert contents(fake.asked[1]) == ["one"]
    assert contents(fake.asked[2]) == ["one", "answer 2", "two"]
    fake.asked.clear()
    assert "temperature 0" in talk("one", "/regenerate", flags=["--temperature=0"])
    assert len(fake.asked) == 1


def test_undo_and_reset(talk, fake):
    out = talk("/undo", "one", "two", "/undo", "three", "/clear", "four", "/reset", "five")
    assert out.startswith("(there is nothing to take back)\n")
    assert [contents(messages) for messages in fake.asked] == [
        ["one"],
        ["one", "answer 1", "two"],
        ["one", "answer 1", "three"],
        ["four"],
        ["five"],
    ]


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(talk, fake):
    fake.answers = ["half!", "!", "whole", "!"]
    out = talk("one", "two", "three", "/regenerate", "four")
    assert "model: half\n(stopped)\n" in out
    assert "(stopped) before a word was said" in out
    assert contents(fake.asked[2]) == ["one", "half", "three"]
    assert contents(fake.asked[4]) == ["one", "half", "three", "whole", "four"]


def test_settings(talk, fake):
    out = talk(
        "/set temperature 0.2",
        "/set top_k 3",
        "/set stop ###",
        '/set stop "\\n"',
        "one",
        "/set stop",
        "/set max_new_tokens 9",
        "two",
        "/set",
    )
    assert fake.settings[0] == {
        "max_new_tokens": 256,
        "temperature": 0.2,
        "top_k": 3,
        "top_p": 0.95,
        "min_p": 0.0,
        "stop": ["\n"],
        "seed": 0,
    }
    assert fake.settings[1] == fake.settings[0] | {"stop": [], "max_new_tokens": 9}
    assert out.endswith("stop = []\nseed = 0\ntemperature = 0.2\ntop_k = 3\ntop_p = 0.95\n"
                        "min_p = 0.0\n\n")  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature warm", "takes a number, not 'warm'"),
        ("/set temperature -1", "temperature=-1.0 must be at least 0"),
        ("/set top_p 0", "top_p=0.0 must be above 0"),
        ("/set top_k 2.5", "takes a number"),
        ("/set max_new_tokens 0", "at least 1"),
        ("/set warmth 1", "there is no setting warmth"),
        ('/set stop "', "is no JSON string"),
        ("/speak", "there is no /speak"),
        ("/load none.jsonl", "No such file"),
        ("/load", "say what"),
        ("/save x.jsonl", "nothing to save yet"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    talk, fake, tmp_path, monkeypatch, line, said
):
    monkeypatch.chdir(tmp_path)
    out = talk(line, "one")
    assert said in out.splitlines()[0]
    assert out.splitlines()[0].startswith("(")
    assert contents(fake.asked[0]) == ["one"]
    assert fake.settings[0]["temperature"] == 0.7
    assert not list(tmp_path.iterdir())


def test_two_slashes_send_one(talk, fake):
    talk("//etc/passwd")
    assert contents(fake.asked[0]) == ["/etc/passwd"]


def test_help_names_every_command(talk, fake):
    out = talk("/help", "/quit", "one")
    assert out == chat_command.HELP
    assert set(re.findall(r"^/\w+", out, re.MULTILINE)) >= {"/help", "/regenerate", "/undo"}
    assert not fake.asked


def test_save_and_load(talk, fake, tmp_path):
    path = tmp_path / "my chat.jsonl"
    fake.answers = ["é\u2028 "]
    out = talk("/system be kind", "one", f"/save {path}", "two", f"/save {path}")
    assert out.count(f"(saved in {path})") == 2
    (line,) = path.read_text(encoding="utf-8").split("\n")[:-1]
    row = json.loads(line)
    assert contents(row["messages"]) == ["be kind", "one", "é\u2028 ", "two", "answer 2"]
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    assert read_lines(path, [])[0].messages == row["messages"]  # as --prompts reads it
    schema = own_schemas()["own"]
    assert schema.unfit(row) is None
    assert next(iter(schema.convert(row)[0]))["messages"] == row["messages"]
    fake.asked.clear()
    talk("/reset", f"/load {path}", "three", "/regenerate")
    assert contents(fake.asked[0]) == [*contents(row["messages"]), "three"]


def test_save_never_buries_a_file(talk, fake, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("mine")
    assert f"{path} exists; name another" in talk("one", f"/save {path}")
    assert "exists" in talk("one", f"/save {tmp_path}")
    assert path.read_text() == "mine"
    other = tmp_path / "b.jsonl"

    def changed():
        other.write_text("changed meanwhile")
        return "x"

    fake.answers = ["x", changed]
    assert "exists; name another" in talk("one", f"/save {other}", "two", f"/save {other}")
    assert other.read_text() == "changed meanwhile"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_load_one_of_several(talk, fake, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n\n{"messages": [{"role": "user", "content": "q"}]}\n[]\n')
    assert f"{path}:4 is not a line" in talk(f"/load {path}")
    path.write_text(path.read_text().replace("[]", ""))
    out = talk(f"/load {path}", f"/load {path}:2", f"/load {path}:3", "/regenerate")
    assert "has 2 conversations" in out
    assert "no conversation in line 2" in out
    assert "the last turn has no reply" in out
    assert contents(fake.asked[0]) == ["q"]
    assert fake.settings[0]["seed"] == 0


def test_a_full_conversation_says_so_and_drops_nothing(talk, fake):
    long = "the lorn is blue " * 13
    out = talk("one", long, long, "/undo", "two")
    assert "256 positions: this turn was not sent, and nothing was dropped" in out
    assert "/undo makes room, /reset begins anew" in out
    assert contents(fake.asked[1]) == ["one", "answer 1", long.strip()]
    assert contents(fake.asked[2]) == ["one", "answer 1", "two"]
    assert len(fake.asked) == 3


def test_the_last_positions_are_announced(talk, fake):
    fake.answers = ["x" * 230]
    assert re.search(r"\((\d|1\d) of 256 positions are left; /undo or /reset", talk("one"))


def test_bad_flags_are_refused_at_once(model, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", f"--model={model}", "--chat", "--temperature=-1"])
    assert ended.value.code == 2
    assert "temperature=-1.0 must be at least 0" in capsys.readouterr().err
