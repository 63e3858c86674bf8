"""`python -m zephyr_jax.recipes`: the recipes of the installed package, to see and to take."""

import subprocess
import sys
from pathlib import Path

import pytest
from zephyr_jax.recipes.__main__ import main

from zephyr_jax.config.run import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_list_names_every_file_and_what_it_is(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in CONFIGS.glob("[a-z]*.py"))
    assert all(len(line.split()) > 3 for line in lines), lines


def test_show_and_copy_give_the_file(capsys, tmp_path):
    main(["show", "zephyr_7b_dpo"])
    assert capsys.readouterr().out == (CONFIGS / "zephyr_7b_dpo.py").read_text()
    main(["copy", "demo_sft", str(tmp_path / "new")])
    copied = tmp_path / "new" / "demo_sft.py"
    assert capsys.readouterr().out.strip() == str(copied)
    assert load_config(str(copied)) == load_config("demo_sft")
    assert list(copied.parent.iterdir()) == [copied]


def test_bad_input_is_one_line(capsys, tmp_path):
    (tmp_path / "demo_sft.py").write_text("mine")
    for words, said in (
        (["show", "zephyr"], "no recipe 'zephyr'; there are demo_dpo, "),
        (["copy", "demo_sft", str(tmp_path)], "exists; remove it"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "demo_sft.py").read_text() == "mine"


def test_it_is_a_module_that_starts_without_jax():
    code = "import runpy, sys; sys.argv[1:] = ['list']\n"
    code += "runpy.run_module('zephyr_jax.recipes', run_name='__main__')\n"
    code += "assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "zephyr_7b_sft" in done.stdout
