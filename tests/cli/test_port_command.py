"""The command port_weights: flags without effect, and trouble with files, are one line each."""

import errno

import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.cli import port_weights


@pytest.fixture
def refused(capsys):
    """What the command says on stderr when it refuses, which is one line."""

    def refuse(*words):
        with pytest.raises(SystemExit) as ended:
            main(["port_weights", *map(str, words)])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    return refuse


@pytest.mark.parametrize(
    "flag", ["--dtype=float32", "--dtype=q8_0", "--format=hf", "--format=gguf", "--max_shard_gb=5"]
)
def test_an_import_refuses_the_flags_of_an_export(refused, flag):
    assert f"{flag.split('=')[0]} has no effect on import: " in refused(
        "import", "nowhere", "out", flag
    )


def test_a_gguf_is_never_divided(refused):
    said = refused("export", "nowhere", "out.gguf", "--format=gguf", "--max_shard_gb=5")
    assert "--max_shard_gb has no effect on --format=gguf: " in said


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1", "1e-12"])
def test_a_shard_has_a_size(refused, size):
    assert f"--max_shard_gb={float(size)} must be" in refused(
        "export", "nowhere", "out", f"--max_shard_gb={size}"
    )


@pytest.mark.parametrize("words", [["import"], ["export"], ["export", "--format=gguf"]])
def test_a_name_that_is_too_long(refused, words, tmp_path):
    target = tmp_path / ("n" * 300 + ".gguf")
    assert "File name too long" in refused(*words, "nowhere", target)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EISDIR, errno.EROFS, errno.ELOOP])
def test_what_the_file_system_refuses_is_one_line(refused, monkeypatch, number):
    def fail(_):
        raise OSError(number, "it fails", "a\nfile")

    monkeypatch.setattr(port_weights, "run", fail)
    assert "it fails" in refused("import", "a", "b")


@pytest.mark.parametrize("defect", [TypeError, KeyError, RuntimeError, AssertionError])
def test_a_defect_keeps_its_traceback(monkeypatch, defect):
    def fail(_):
        raise defect("ours")

    monkeypatch.setattr(port_weights, "run", fail)
    with pytest.raises(defect):
        main(["port_weights", "import", "a", "b"])
