"""The commands as a user meets them: help, one-line errors, nothing half-written."""

import errno
import signal
import sys
from pathlib import Path

import pytest
from processes import output_of

from zephyr_jax.__main__ import COMMANDS, main
from zephyr_jax.cli import port_weights
from zephyr_jax.distributed import ShutdownHandler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert "usage" in capsys.readouterr().out


def test_scripts_are_the_commands():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert {path.stem for path in scripts} == set(COMMANDS) - {"demo", "doctor"}
    assert "--config" in output_of([sys.executable, scripts[-1], "--help"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "no command 'nonsense'"),
        ("train --config=nowhere.py", "no config file nowhere.py"),
        ("train --config=demo_sft --config.optim.peek_lr=1", "peek_lr"),
        ("train --config=demo_sft --wrkdir=x", "unknown arguments: --wrkdir=x"),
        ("train --config=demo_sft --config.data.data_dir=/nowhere", "tokenizer"),
        ("generate --model=nowhere --prompt=x", "nowhere is not a model"),
        ("generate --model=x --prompt=x --tensor=3", "--tensor=3 times --fsdp=1 must divide"),
        ("generate --model=nowhere --prompts=none.jsonl", "--output belong together"),
        ("generate --model=nowhere --prompts=none.jsonl --output=o", "none.jsonl"),
        ("generate --model=nowhere --prompts=x --output=./x", "--prompts and --output are both x"),
        ("prepare_data ultrachat --source=nowhere --data_dir=d", "nowhere"),
        ("prepare_data ultrachat --source= --data_dir=d", "argument --source: it is empty"),
        ("prepare_data messages --config_name=", "argument --config_name: it is empty"),
        ("prepare_data messages --workers=-1", "argument --workers: -1 must be at least 0"),
        ("train --config=demo_sft --samples=-1", "argument --samples: -1 must be at least 0"),
        ("evaluate --model=x --dataset=y", "arguments are required: sets"),
        ("import nowhere out", "nowhere is not a model"),
        ("import SRC out --dtype=q8_0", "--dtype has no effect on this import"),
        ("import SRC out --push=org/x", "--push has no effect on this import"),
        ("import SRC out --base=c", "is no folder with a PEFT adapter; download"),
        ("import SRC full", "exists and is not empty"),
        ("import SRC LONG", "File name too long"),
        ("export SRC full", "is not an export of zephyr_jax (it holds mine"),
        ("export SRC full/mine.gguf --format=gguf", "is not an export of zephyr_jax"),
        ("export SRC out --public", "--public has no effect on this export"),
        ("export SRC --push=x out", "cannot be pushed to; name it org/name"),
        ("export SRC out --base=c", "--base has no effect on this export"),
        ("export SRC out --dtype=q8_0", "--dtype=q8_0 belongs to an export with --format=gguf"),
        ("export SRC out --format=peft", "SRC holds no adapters of a run; only a workdir"),
        ("export SRC LONG.gguf --format=gguf", "File name too long"),
    ],
)
def test_bad_input_is_one_clear_line(refused, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "full" / "mine.gguf").write_text("x")
    words = line.replace("LONG", "n" * 300).replace("SRC", "no/SRC").split()
    if words[0] in ("import", "export"):
        words = ["port_weights", *words]
    assert message in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_error_of_the_file_system_is_one_line_and_a_defect_a_traceback(refused, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(port_weights, "run", fail)
    error = OSError(errno.ENOSPC, "it fails", "a\nfile")
    assert "it fails" in refused("port_weights", "import", "a", "b")
    error = RuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.7G hbm.\nmore\nlines")  # JAX's
    assert "Used 20.5G of 15.7G hbm.: more train.micro_batches" in refused(
        "port_weights", "import", "a", "b"
    )
    for error in (KeyError("ours"), AssertionError()):
        with pytest.raises(type(error)):
            main(["port_weights", "import", "a", "b"])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")  # all that JAX says then is an AssertionError
    assert "'cuda': unset JAX_PLATFORMS" in refused("port_weights", "import", "a", "b")


@pytest.fixture
def keyboard():
    """SIGINT is as it was after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_keyboard_stops_a_command_in_one_line(keyboard, monkeypatch, capsys):
    monkeypatch.setattr("zephyr_jax.cli.doctor.run", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="^130$"):
        main(["doctor"])
    assert capsys.readouterr().err.split("\n") == ["", "error: stopped by the keyboard", ""]


def test_sigint_twice_is_obeyed_at_once_whoever_caught_the_first(keyboard, monkeypatch):
    def twice(_):
        with ShutdownHandler() as shutdown:  # as in training
            signal.raise_signal(signal.SIGINT)
            assert shutdown.signals == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)

    def ends(status):
        raise RuntimeError(f"ended with {status}")

    monkeypatch.setattr("zephyr_jax.cli.doctor.run", twice)
    monkeypatch.setattr("os._exit", ends)
    with pytest.raises(RuntimeError, match="ended with 130"):
        main(["doctor"])
