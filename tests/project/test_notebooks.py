"""The notebooks: what they may use, and that they run.

They say what they claim by asserts of their own; here their figures are counted.
"""

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from processes import output_of

import zephyr_jax as zj

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "dev"))

import site_pages

FOLDER = ROOT / "notebooks"
FIGURES = {
    "01_model_from_the_inside": 4,
    "02_masks_and_packing": 3,
    "03_sft_on_a_small_set": 2,
    "04_dpo_by_hand": 4,
    "05_sharding_made_visible": 2,
    "06_weights_in_and_out": 2,
    "07_planning_a_pod_run": 2,
    "08_own_data": 1,
    "09_a_feedback_round": 2,
}
INSTALL = 'if importlib.util.find_spec("zephyr_jax") is None:'
OF_TUPLES = {"_asdict", "_fields", "_replace"}  # NamedTuple's public methods
MODULES = {"flax", "jax", "matplotlib", "numpy", "optax", "zephyr_jax"} | sys.stdlib_module_names


def imported(node):
    """Every name of an import statement, with its module in front."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_uses_public_names_and_files_that_are_there(name):
    text = (FOLDER / f"{name}.py").read_text()
    # Cells as jupytext's percent format divides a file: before the first there is no text.
    before, *parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    assert not before.strip()
    assert {kind.strip() for kind in parts[0::2]} == {"", "[markdown]"}
    assert [kind.strip() for kind in parts[0:4:2]] == ["[markdown]", ""]
    assert parts[1].startswith("# # ")
    assert INSTALL in parts[3]
    for file in re.findall(r"`([\w/]+\.py)`", text):
        homes = (ROOT / "zephyr_jax", ROOT, ROOT / "scripts")
        assert any((home / file).is_file() for home in homes), f"there is no {file}"
    for node in ast.walk(ast.parse(text)):
        for full in imported(node):
            assert full.split(".")[0] in MODULES, full
            if full.startswith("zephyr_jax."):
                assert not any(part.startswith("_") for part in full.split(".")), full
                home, _, last = full.rpartition(".")
                there = hasattr(importlib.import_module(home), last)
                assert there or importlib.util.find_spec(full), full
        if isinstance(node, ast.Attribute):
            private = re.match(r"_[a-z]", node.attr) and node.attr not in OF_TUPLES
            assert not private, f"{node.attr} is not public"
            if isinstance(node.value, ast.Name) and node.value.id == "zj":
                assert node.attr in zj.__all__, f"zj.{node.attr}"


@pytest.mark.parametrize("name", FIGURES)
def test_the_site_shows_the_outputs_of_this_code(name):
    """After a change: python scripts/dev/render_notebooks.py NAME."""
    stored = json.loads((site_pages.OUTPUTS / f"{name}.json").read_text("utf-8"))
    assert stored["code"] == site_pages.code_digest(FOLDER / f"{name}.py")
    figures = [figure for cell in stored["cells"].values() for figure in cell["figures"]]
    assert len(figures) == FIGURES[name]
    for figure in figures:
        assert (site_pages.OUTPUTS / figure).stat().st_size < 60_000
    pytest.importorskip("latex2mathml", reason="comes with the extra docs")
    page = site_pages.notebook_page(FOLDER / f"{name}.py")
    assert page.startswith("# ")
    assert page.count("![") == FIGURES[name]
    texts = [cell["text"] for cell in stored["cells"].values() if cell.get("text")]
    assert all(f"```text\n{text}\n```" in page for text in texts)
    assert ("<math" in page) == any(
        "$" in text for _, text in site_pages.notebook_cells(FOLDER / f"{name}.py")
    )


def test_the_table_names_every_notebook():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FIGURES)
    table = (FOLDER / "README.md").read_text()
    for name in FIGURES:
        assert f"`{name}.py`" in table


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
def test_a_notebook_runs(name, tmp_path):
    """With the package alone: no flags of this test run, and a folder for its scratch."""
    for needed in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(needed, reason="comes with the extra notebooks")
    dropped = ("XLA_FLAGS", "MPLBACKEND")  # the kernel has its own
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    environment |= {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", _EXECUTE, FOLDER / f"{name}.py"]
    written = output_of(words, cwd=tmp_path, env=environment, timeout=1500)
    assert json.loads(written.splitlines()[-1]) == {"figures": FIGURES[name], "errors": []}
