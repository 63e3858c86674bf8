"""The bounds of the house, its picture, its words and its public names: see docs/design.md."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zephyr_jax as zj

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "dev"))

import house


@pytest.mark.parametrize("bound", house.bounds(), ids=lambda bound: bound.name)
def test_the_house_keeps_its_bounds(bound):
    assert bound.value <= bound.most, f"{bound.name}: {bound.value}, at most {bound.most}"


def test_the_picture_shows_the_imports_of_today():
    assert house.picture() == house.PICTURE.read_text("utf-8"), "run `make picture`"


def test_the_package_uses_no_words_of_its_own_and_no_private_name_of_another():
    words = re.compile(
        r"\b((?i:portions?|beside|anew|by lot|letters_of|blot|straddl\w+)\b|jax\._src)"
        r"|type_handlers|HfHubHTTPError\.__|huggingface_hub\._"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in house.python_files(house.PACKAGE)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


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


def test_the_data_room_starts_without_jax_and_tfds():
    code = "import zephyr_jax.data.prepare.prepare, zephyr_jax.cli.prepare_data, sys\n"
    code += "print(sorted({'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_benchmarks_import_names_that_are_there():
    absent = []
    for path in house.python_files(ROOT / "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("zephyr_jax"):
                module = importlib.import_module(str(node.module))
                modules = {
                    each.name for each in pkgutil.iter_modules(getattr(module, "__path__", []))
                }
                names = {alias.name for alias in node.names} - modules
                absent += [(path.name, name) for name in names if not hasattr(module, name)]
    assert absent == []


@pytest.mark.slow
def test_benchmarks_call_the_package_as_it_is():
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
