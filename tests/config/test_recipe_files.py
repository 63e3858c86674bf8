"""`python -m zephyr_jax.recipes`: the recipes of the installed package, to see and to take."""

import sys
from pathlib import Path

import pytest
from processes import output_of
from zephyr_jax.recipes.__main__ import literal, main

from zephyr_jax.config.run import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))
VARIANTS = [name for name in NAMES if "as base" in (CONFIGS / f"{name}.py").read_text()]


def test_list_names_every_file_and_what_it_is(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 3 for line in lines), lines


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("feedback")])
def test_the_literal_text_is_the_same_run_without_a_base(name, tmp_path):
    text, config = literal(name), load_config(name)
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    assert load_config(str(path)) == load_config(str(CONFIGS / path.name)) == config
    assert config.name == name
    assert "zephyr_jax" not in text.split('"""')[2]
    if name not in VARIANTS:
        assert text == (CONFIGS / f"{name}.py").read_text()


def test_copy_gives_a_file_that_stands_alone(capsys, tmp_path):
    main(["copy", "zephyr_7b_dpo_qlora", str(tmp_path / "new")])
    copied = tmp_path / "new" / "zephyr_7b_dpo_qlora.py"
    assert capsys.readouterr().out.strip() == str(copied)
    main(["show", "zephyr_7b_dpo_qlora"])
    assert copied.read_text() == capsys.readouterr().out
    assert list(copied.parent.iterdir()) == [copied]


def test_diff_prints_the_fields_that_differ(capsys):
    main(["diff", "zephyr_7b_sft", "zephyr_7b_sft_v5e_16"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["name", "zephyr_7b_sft", "->", "zephyr_7b_sft_v5e_16"],
        ["train.micro_batches", "1", "->", "4"],
        ["mesh.fsdp", "-1", "->", "16"],
    ]
    main(["diff", "zephyr_7b_sft_lora", "zephyr_7b_dpo_lora"])
    assert "\ndpo.beta" in capsys.readouterr().out
    main(["diff", "demo_sft", "demo_sft"])
    assert capsys.readouterr().out == ""


def test_bad_input_is_one_line(capsys, tmp_path):
    (tmp_path / "demo_sft.py").write_text("mine")
    for words, message in (
        (["show", "zephyr"], "no recipe 'zephyr'; there are demo_dpo, "),
        (["diff", "demo_sft", "zephyr"], "no recipe 'zephyr'; there are demo_dpo, "),
        (["copy", "demo_sft", str(tmp_path)], "exists; remove it"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "demo_sft.py").read_text() == "mine"


def test_it_is_a_module_that_starts_without_jax():
    code = "import runpy, sys; sys.argv[1:] = ['list']\n"
    code += "runpy.run_module('zephyr_jax.recipes', run_name='__main__')\n"
    code += "assert 'jax' not in sys.modules"
    assert "zephyr_7b_sft" in output_of([sys.executable, "-c", code])
