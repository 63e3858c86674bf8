import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zephyr_jax as zj


def test_every_public_name_is_there_and_no_other():
    for name in zj.__all__:
        assert getattr(zj, name) is not None
    assert dir(zj) == sorted(zj.__all__)
    tree = ast.parse(Path(zj.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {(f"zephyr_jax.{home}", name) for name, home in zj._HOME.items()}
    assert {name for _, name in imported} | {"__version__"} == set(zj.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        zj.trainer  # noqa: B018


def test_the_data_station_starts_without_jax_and_tfds():
    code = "import zephyr_jax.data.prepare.prepare, zephyr_jax.cli.prepare_data, sys\n"
    code += "print(sorted({'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"
