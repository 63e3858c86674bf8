"""What a release holds, and the package as others get it: built, installed and used elsewhere.

The slow tests install the wheel into an empty environment, where nothing may come from the
checkout. They need the package index, for what the package depends on.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import processes
import pytest

import zephyr_jax

ROOT = Path(__file__).parents[2]


def tracked():
    """Files of the repository, those that are about to be added included."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def setup():
    found = configparser.RawConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def test_setup_cfg_names_every_package(setup):
    there = {path.parent.relative_to(ROOT) for path in ROOT.glob("zephyr_jax/**/__init__.py")}
    packages = {".".join(path.parts) for path in there} | {"zephyr_jax.recipes"}
    assert set(setup["options"]["packages"].split()) == packages


def test_package_data_has_every_file_that_is_no_code(setup):
    everywhere = setup["options.package_data"]["*"].split(", ")
    own = {
        path
        for package, patterns in setup["options.package_data"].items()
        if package != "*"
        for pattern in patterns.split(", ")
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    for path in (ROOT / "zephyr_jax").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc") and path not in own:
            assert any(path.match(pattern) for pattern in everywhere), path
            assert (path.parent / "__init__.py").is_file(), f"{path} is in no package"


def test_the_version_stands_in_one_place(setup):
    assert setup["metadata"]["version"] == "attr: zephyr_jax._version.__version__"
    version = zephyr_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()
    for name in ("CITATION.cff", "Dockerfile", "README.md", "pyproject.toml", "mkdocs.yml"):
        assert not re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", (ROOT / name).read_text())


def test_extras_ask_for_the_jax_of_the_package(setup):
    wanted = re.search(r"^jax(\S+)$", setup["options"]["install_requires"], re.MULTILINE)
    assert wanted
    extras = setup["options.extras_require"]
    for extra, name in {"tpu": "tpu", "cuda": "cuda12", "cuda13": "cuda13"}.items():
        assert extras[extra] == f"jax[{name}]{wanted[1]}"


def test_the_image_is_built_from_what_is_not_ignored():
    """A COPY of the Dockerfile is let through by .dockerignore, and is there."""
    copies = re.findall("^COPY (.+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = set(" ".join(copies).split())
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in lines if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_passes_the_linter():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint is not installed here (extra test)")
    processes.output_of([linter, ROOT / "Dockerfile"])


def test_the_source_distribution_leaves_nothing_out():
    """MANIFEST.in names every file and folder of the top level."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    named = {name for words in lines if words[:1] in (["include"], ["graft"]) for name in words[1:]}
    always = {"README.md", "LICENSE", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    assert {name.split("/")[0] for name in tracked()} - named <= always


def output_of(*words, cwd):
    """What a command wrote; no variable of the tests' own process reaches it."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    passed = [key for key in os.environ if key.startswith(("PIP_", "SSL_", "REQUESTS_", "LANG"))]
    environment |= {key: os.environ[key] for key in passed}
    return processes.output_of([*words], cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel made from it), and the environment's Python."""
    root = tmp_path_factory.mktemp("built")
    for name in tracked():
        (root / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / "copy" / name)
    output_of(sys.executable, "-m", "venv", root / "venv", cwd=root)
    python = root / "venv" / "bin" / "python"
    output_of(python, "-m", "pip", "install", "--quiet", "setuptools>=77", cwd=root)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(root)!r})"
    output_of(python, "-c", code, cwd=root / "copy")
    (sdist,) = root.glob("*.tar.gz")
    output_of(
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
    output_of(python, "-m", "pip", "install", "--quiet", wheel, cwd=empty)

    def run(*words):
        return output_of(python, *words, cwd=empty)

    run.folder = empty  # type: ignore  # for the tests
    code = "import zephyr_jax as z, zephyr_jax.recipes as r; print(z.__file__, *r.__path__)"
    where = run("-c", code)
    assert all("site-packages" in path and str(ROOT) not in path for path in where.split())
    return run


@pytest.mark.slow
def test_the_source_distribution_is_the_repository(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked()) - names == set()


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked() if name.startswith("zephyr_jax/")}
    recipes = {name for name in tracked() if name.startswith("configs/")}
    wanted |= {name.replace("configs/", "zephyr_jax/recipes/", 1) for name in recipes}
    assert names == wanted


@pytest.mark.slow
def test_recipes_come_along(run):
    listed = run("-m", "zephyr_jax.recipes", "list")
    assert len(listed.splitlines()) == len(list(ROOT.glob("configs/[a-z]*.py")))
    copied = run("-m", "zephyr_jax.recipes", "copy", "demo_sft", "mine").strip()
    assert (run.folder / copied).read_text() == (ROOT / "configs" / "demo_sft.py").read_text()


@pytest.mark.slow
def test_the_demo_a_port_and_a_chat(run):
    out = run("-m", "zephyr_jax", "demo", "--short", "--workdir=demo")
    assert (run.folder / "demo" / "report.html").is_file(), out
    run("-m", "zephyr_jax", "port_weights", "import", "demo/hf", "ours")
    run("-m", "zephyr_jax", "port_weights", "export", "ours", "back", "--dtype=float32")
    first, second = (run.folder / name / "model.safetensors" for name in ("demo/hf", "back"))
    assert first.read_bytes() == second.read_bytes()
    words = ("generate", "--model=back", "--prompt=Hello", "--max_new_tokens=8")
    assert run("-m", "zephyr_jax", *words).strip()
    assert "runs will work here" in run("-m", "zephyr_jax", "doctor")


@pytest.mark.slow
def test_the_console_script_is_the_command_line(built, run):
    shown = output_of(built[2].with_name("zephyr-jax"), "--help", cwd=run.folder)
    assert shown == run("-m", "zephyr_jax", "--help")
