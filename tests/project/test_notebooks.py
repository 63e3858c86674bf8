"""The notebooks: what they may use, and that they run, as scripts and as notebooks.

They say what they claim by asserts of their own; here their figures are counted.
"""

import ast
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import zephyr_jax as zj

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
FIGURES = {
    "01_model_from_the_inside": 4,
    "02_masks_and_packing": 3,
    "03_sft_on_a_small_set": 2,
    "04_dpo_by_hand": 4,
    "05_sharding_made_visible": 2,
    "06_weights_in_and_out": 2,
    "07_planning_a_pod_run": 2,
}
INSTALL = 'if importlib.util.find_spec("zephyr_jax") is None:'
OF_TUPLES = {"_asdict", "_fields", "_replace"}  # NamedTuple's public methods
OTHERS = {"flax", "jax", "matplotlib", "numpy", "optax"}


def cells(path):
    """(kind, text) of every cell, as jupytext's percent format divides a file."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)
    assert not parts[0].strip(), "text before the first cell"
    return [(head.strip(), body) for head, body in zip(parts[1::2], parts[2::2], strict=True)]


def public(name):
    return not any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_uses_public_names_that_are_there(name):
    path = FOLDER / f"{name}.py"
    kinds = [kind for kind, _ in cells(path)]
    assert set(kinds) == {"", "[markdown]"}
    assert kinds[:2] == ["[markdown]", ""]
    assert cells(path)[0][1].startswith("# # ")
    assert INSTALL in cells(path)[1][1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                assert top in OTHERS | {"zephyr_jax"} | sys.stdlib_module_names, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert module.split(".")[0] in OTHERS | {"zephyr_jax"} | sys.stdlib_module_names
            if module.startswith("zephyr_jax"):
                home = importlib.import_module(module)
                for alias in node.names:
                    assert public(f"{module}.{alias.name}"), alias.name
                    there = hasattr(home, alias.name) or importlib.util.find_spec(
                        f"{module}.{alias.name}"
                    )
                    assert there, f"{module} has no {alias.name}"
        elif isinstance(node, ast.Attribute):
            private = re.match(r"_[a-z]", node.attr) and node.attr not in OF_TUPLES
            assert not private, f"{node.attr} is not public"
            if isinstance(node.value, ast.Name) and node.value.id == "zj":
                assert node.attr in zj.__all__, f"zj.{node.attr}"


def test_the_table_names_every_notebook():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FIGURES)
    said = (FOLDER / "README.md").read_text()
    for name in FIGURES:
        assert f"`{name}.py`" in said


def test_the_notebooks_are_lint_clean():
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", str(FOLDER)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_private_name_is_found():
    tree = ast.parse("from zephyr_jax.training.loop import _Run")
    assert not public(tree.body[0].names[0].name)


def environment(tmp_path):
    """What a notebook finds: the package, no flags of this test run, a folder for its scratch."""
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    paths = [str(ROOT), kept.get("PYTHONPATH", "")]
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "TMPDIR": str(tmp_path),
    }


def seconds():
    """Processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_as_a_script(name, tmp_path, record_testsuite_property):
    before = seconds()
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    record_testsuite_property(f"{name}, script, processor seconds", round(seconds() - before, 1))
    assert done.returncode == 0, done.stderr[-3000:]


_EXECUTE = """
import json, sys
import jupytext, nbclient
notebook = jupytext.read(sys.argv[1])
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
kinds = [kind for output in outputs for kind in output.get("data", {})]
errors = [output["ename"] for output in outputs if output["output_type"] == "error"]
print(json.dumps({"figures": kinds.count("image/png"), "errors": errors}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_as_a_notebook(name, tmp_path, record_testsuite_property):
    for needed in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(needed, reason="comes with the extra notebooks")
    before = seconds()
    found = environment(tmp_path)
    del found["MPLBACKEND"]  # the kernel has its own
    done = subprocess.run(
        [sys.executable, "-c", _EXECUTE, str(FOLDER / f"{name}.py")],
        cwd=tmp_path, env=found, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    record_testsuite_property(f"{name}, notebook, processor seconds", round(seconds() - before, 1))
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {"figures": FIGURES[name], "errors": []}
