"""What a release holds: packages, data files, one version, an image, a citation."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import zephyr_jax

ROOT = Path(__file__).parents[2]


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
    extras = setup["options.extras_require"]
    for extra, name in {"tpu": "tpu", "cuda": "cuda12", "cuda13": "cuda13"}.items():
        assert extras[extra] == f"jax[{name}]{wanted[1]}"


def test_the_image_is_built_from_what_is_not_ignored():
    """A COPY of the Dockerfile is let through by .dockerignore, and is there."""
    copied = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_passes_the_linter():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint is not installed here (extra test)")
    done = subprocess.run(
        [linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_citation_has_what_its_format_asks_for():
    """The required fields of Citation File Format 1.2.0, and no field that it does not know."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cff)
    known = {"cff-version", "message", "title", "type", "authors", "license", "abstract"}
    assert set(cff) <= known | {"keywords", "references"}
    for work in (cff, *cff["references"]):
        assert work["title"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    for work in cff["references"]:
        assert work["type"] == "article"
        assert work["identifiers"][0]["value"].startswith("arXiv:")
    assert cff["license"] == setup_license()


def setup_license():
    return re.search(r"^license = (\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]


def test_the_source_distribution_leaves_nothing_out():
    """MANIFEST.in names every file and folder of the top level."""
    asked = set()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *names = line.split() or [""]
        if command in ("include", "graft"):
            asked |= set(names)
    listed = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git repository here")
    tops = {name.split("/")[0] for name in listed.stdout.splitlines()}
    always = {"README.md", "LICENSE", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    assert tops - asked <= always
