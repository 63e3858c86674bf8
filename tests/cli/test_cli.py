"""The commands as a user meets them: help, one-line errors, nothing half-written."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run(capsys, *words):
    """Exit status and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert "usage" in capsys.readouterr().out


def test_scripts_are_the_commands():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert {path.stem for path in scripts} == set(COMMANDS) - {"demo", "doctor"}
    done = subprocess.run(
        [sys.executable, scripts[-1], "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "no command 'nonsense'"),
        (["train", "--config=nowhere.py"], "no config file nowhere.py"),
        (["train", "--config=demo_sft", "--config.optim.peek_lr=1"], "peek_lr"),
        (["train", "--config=demo_sft", "--wrkdir=x"], "unknown arguments: --wrkdir=x"),
        (["train", "--config=demo_sft", "--config.data.data_dir=/nowhere"], "tokenizer"),
        (["port_weights", "export", "nowhere", "out"], "nowhere is not a model"),
        (["generate", "--model=nowhere", "--prompt=x"], "nowhere is not a model"),
        (["generate", "--model=nowhere", "--prompts=none.jsonl"], "--output belong together"),
        (["generate", "--model=nowhere", "--prompts=none.jsonl", "--output=o"], "none.jsonl"),
        (["prepare_data", "ultrachat", "--source=nowhere", "--data_dir=d"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = run(capsys, *words)
    assert code == 2
    assert message in [line for line in err.splitlines() if line.startswith("error: ")][-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(cfg, tok, tmp_path_factory):
    """A small random model as a Hugging Face folder."""
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size)
    return zj.export_hf(cfg, random_params(cfg), tok, tmp_path_factory.mktemp("cli") / "hf")


def test_import_and_export_are_byte_for_byte(exported, tmp_path):
    main(["port_weights", "import", str(exported), str(tmp_path / "ours")])
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    main(["port_weights", "export", ours, back, "--dtype=float32"])
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (exported / weights).read_bytes()
    assert (tmp_path / "back" / "config.json").read_text() == (exported / "config.json").read_text()


def test_generate_one_shot_batch_and_chat(exported, tmp_path, capsys, monkeypatch):
    model = f"--model={exported}"
    main(["generate", model, "--prompt=Hello", "--max_new_tokens=5"])
    assert capsys.readouterr().out.strip()
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Hello", "id": 7}, {"messages": [{"role": "user", "content": "You?"}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "replies.jsonl"
    main(["generate", model, f"--prompts={prompts}", f"--output={out}", "--max_new_tokens=5"])
    replies = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "reply"} for row in replies] == rows
    assert all(isinstance(row["reply"], str) for row in replies)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    lines = iter(["Hello", "And you?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    capsys.readouterr()
    main(["generate", model, "--chat", "--max_new_tokens=6"])
    assert capsys.readouterr().out.count("model: ") == 2
