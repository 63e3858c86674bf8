"""The package as others get it: built, installed into an empty environment, and used there.

Nothing may come from the checkout. Needs the package index, for what the package depends on.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def tracked():
    """Files of the repository, those that are about to be added included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git repository here")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def said(*words, cwd, **more):
    """What a command wrote; no variable of the tests' own process reaches it."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    passed = [key for key in os.environ if key.startswith(("PIP_", "SSL_", "REQUESTS_"))]
    environment |= {key: os.environ[key] for key in (*passed, "LANG") if key in os.environ}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel made from it), and the environment's Python."""
    root = tmp_path_factory.mktemp("built")
    for name in tracked():
        (root / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / "copy" / name)
    said(sys.executable, "-m", "venv", root / "venv", cwd=root)
    python = root / "venv" / "bin" / "python"
    said(python, "-m", "pip", "install", "--quiet", "setuptools>=77", cwd=root)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(root)!r})"
    said(python, "-c", code, cwd=root / "copy")
    (sdist,) = root.glob("*.tar.gz")
    said(
        *(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *(f"--wheel-dir={root}", sdist),
        cwd=root,
    )
    (wheel,) = root.glob("*.whl")
    shutil.rmtree(root / "copy")
    return sdist, wheel, python


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """Runs `python WORDS` in an empty folder with the wheel installed."""
    _, wheel, python = built
    empty = tmp_path_factory.mktemp("empty")
    said(python, "-m", "pip", "install", "--quiet", wheel, cwd=empty)

    def run(*words):
        return said(python, *words, cwd=empty)

    run.folder = empty
    return run


def test_the_source_distribution_is_the_repository(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked()) - names == set()


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked() if name.startswith("zephyr_jax/")}
    recipes = {name for name in tracked() if name.startswith("configs/")}
    wanted |= {name.replace("configs/", "zephyr_jax/recipes/", 1) for name in recipes}
    assert names == wanted


def test_nothing_comes_from_the_checkout(run):
    where = run(
        "-c", "import zephyr_jax, zephyr_jax.recipes as r; print(zephyr_jax.__file__, *r.__path__)"
    )
    for path in where.split():
        assert "site-packages" in path
        assert not Path(path).is_relative_to(ROOT)


def test_recipes_come_along(run):
    listed = run("-m", "zephyr_jax.recipes", "list")
    assert len(listed.splitlines()) == len(list(ROOT.glob("configs/[a-z]*.py")))
    shown = run("-m", "zephyr_jax.recipes", "show", "zephyr_7b_dpo")
    assert shown == (ROOT / "configs" / "zephyr_7b_dpo.py").read_text()
    copied = run("-m", "zephyr_jax.recipes", "copy", "demo_sft", "mine").strip()
    assert (run.folder / copied).read_text() == (ROOT / "configs" / "demo_sft.py").read_text()


def test_the_doctor_is_content(run):
    report = json.loads(run("-m", "zephyr_jax", "doctor", "--json"))
    assert report["ok"], report["problems"]
    assert all(line["installed"] for line in report["versions"].values())


def test_the_demo_a_port_and_a_chat(run):
    out = run("-m", "zephyr_jax", "demo", "--short", "--workdir=demo")
    assert (run.folder / "demo" / "report.html").is_file(), out
    run("-m", "zephyr_jax", "port_weights", "import", "demo/hf", "ours")
    run("-m", "zephyr_jax", "port_weights", "export", "ours", "back", "--dtype=float32")
    first, second = (run.folder / name / "model.safetensors" for name in ("demo/hf", "back"))
    assert first.read_bytes() == second.read_bytes()
    reply = run(
        "-m", "zephyr_jax", "generate", "--model=back", "--prompt=Hello", "--max_new_tokens=8"
    )
    assert reply.strip()


def test_the_console_script_is_the_command_line(built, run):
    said_by = said(built[2].with_name("zephyr-jax"), "--help", cwd=run.folder)
    assert said_by == run("-m", "zephyr_jax", "--help")
