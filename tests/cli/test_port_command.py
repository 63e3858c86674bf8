"""The command port_weights: flags without effect, and trouble with files, are one line each."""

import errno

import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.cli import port_weights


@pytest.fixture
def refused(capsys):
    """The message of the command when it refuses, which is one line on stderr."""

    def refuse(*words):
        with pytest.raises(SystemExit) as error:
            main(["port_weights", *map(str, words)])
        message = capsys.readouterr().err
        assert error.value.code == 2
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return refuse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import SRC out --dtype=q8_0", "--dtype has no effect on this import"),
        ("import SRC out --format=gguf", "--format has no effect on this import"),
        ("import SRC out --push=org/x", "--push has no effect on this import"),
        ("import SRC out --base=c", "is no folder with a PEFT adapter; download"),
        ("import SRC full", "exists and is not empty"),
        ("export SRC full", "is not an export of zephyr_jax (it holds mine"),
        ("export SRC full/mine.gguf --format=gguf", "is not an export of zephyr_jax"),
        ("export SRC out --public", "--public has no effect on this export"),
        ("export SRC out --push=x", "cannot be pushed to; name it org/name"),
        ("export SRC out --base=c", "--base has no effect on this export"),
        ("export SRC out --dtype=q8_0", "--dtype=q8_0 belongs to an export with --format=gguf"),
        ("export SRC out --format=peft --dtype=q8_0", "--dtype=q8_0 belongs to"),
        ("export SRC out --format=peft --revision=main", "--revision has no effect on"),
        ("export SRC out --format=peft", "SRC is no workdir and no step"),
        ("export SRC out --format=gguf --max_shard_gb=5", "--max_shard_gb has no effect on"),
        *((f"export SRC out --max_shard_gb={x}", f"={float(x)} must be") for x in ("inf", "0")),
        ("export SRC LONG.gguf --format=gguf", "File name too long"),
        ("import SRC LONG", "File name too long"),
    ],
)
def test_a_refusal_is_one_line(refused, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "full" / "mine.gguf").write_text("x")
    assert message in refused(*words.replace("LONG", "n" * 300).replace("SRC", "no/SRC").split())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EISDIR])
def test_an_error_of_the_file_system_is_one_line(refused, monkeypatch, number):
    def fail(_):
        raise OSError(number, "it fails", "a\nfile")

    monkeypatch.setattr(port_weights, "run", fail)
    assert "it fails" in refused("import", "a", "b")


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise KeyError("ours")

    monkeypatch.setattr(port_weights, "run", fail)
    with pytest.raises(KeyError):
        main(["port_weights", "import", "a", "b"])
