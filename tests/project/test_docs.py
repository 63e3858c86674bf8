"""The documentation: links, files, flags, config fields and make targets are there, its code runs.

Each page's code runs in one process and an empty folder (docs_runner.py): every Python block, and
the marked shell blocks. A Python block that cannot run here has `<!-- not run: WHY -->` above it.
"""

import argparse
import dataclasses
import importlib
import os
import re
import shutil
import sys
import typing

import pytest
import yaml
from docs_pages import ROOT, anchors, blocks, commands, included, links, pages
from processes import output_of

from zephyr_jax.__main__ import COMMANDS
from zephyr_jax.config import build, read_file
from zephyr_jax.config.preference import OPTIONS, DpoConfig
from zephyr_jax.config.run import BAD_STEPS, RunConfig, TrainConfig, load_config
from zephyr_jax.feedback.config import FeedbackConfig

sys.path.insert(0, str(ROOT / "scripts" / "dev"))

import site_pages

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
LORA = ["--config.lora.rank=8", "--config.lora.alpha=16"]
# Pages that MkDocs makes of the source: scripts/dev/site_pages.py
MADE = {f"docs/notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.py")}
MADE |= {"docs/api/fields.md"}
SHELL = ("bash", "sh", "console")
# What is neither Python nor shell: shown, not run.
SHOWN = ("", "text", "json", "yaml", "diff", "ini", "dockerfile")


def shell_blocks(page):
    return [block for block in blocks(PAGES[page]) if block.language in SHELL]


def has_code(page):
    return any(
        block.mark != "not run" and (block.language == "python" or block.mark in ("run", "setup"))
        for block in blocks(PAGES[page])
    )


def text(page):
    return PAGES[page].read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_are_there(page):
    path = PAGES[page]
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        aim = (path.parent / name).resolve() if name else path
        if str(aim.relative_to(ROOT)) in MADE:
            continue
        assert aim.exists(), f"{page}: no {target}"
        if page.startswith("docs/"):
            assert aim.is_relative_to(ROOT / "docs"), f"{page}: {target} is outside the site"
        if anchor:
            assert anchor in anchors(aim), f"{page}: no heading for {target}"
    for name in included(path):
        file, _, section = name.partition(":")
        text = (ROOT / file).read_text()
        assert not section or f"--8<-- [start:{section}]" in text, f"{page}: no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    """A path of the repository in a code span, with wildcards or a test's name behind it."""
    if page == "CHANGELOG.md":  # tells of files that were
        return
    ours = r"`((?:docs|tests|configs|scripts|benchmarks|zephyr_jax)/[^`\s:]+)"
    for name in re.findall(ours, text(page)):
        pattern = re.sub(r"\b(NAME|COMMAND)\b", "*", name.rstrip("/,;"))
        assert list(ROOT.glob(pattern)), f"{page}: no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_marks_that_are_known(page):
    for block in blocks(PAGES[page]):
        assert block.language in ("python", *SHELL, *SHOWN), block.place
        if block.language in SHOWN:
            ours = re.search(r"^(python (scripts|-m zephyr)|zephyr-jax |make )", block.text, re.M)
            assert not ours, f"{block.place}: {ours} belongs into a bash block"
        if block.mark == "not run":
            assert block.argument, f"{block.place}: say why"


@pytest.mark.parametrize("page", [page for page in PAGES if shell_blocks(page)])
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    copied = {}
    for block in shell_blocks(page):
        for words in commands(block):
            try:
                check_command(words, copied)
            except (ValueError, OSError, SystemExit) as error:
                raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error


def check_command(words, copied):
    """Raises for a command of ours that would not be understood.

    `copied` are the config files that `recipes copy` made on this page -> recipe; added to.
    """
    while re.fullmatch(r"[A-Za-z_]+=\S*", words[0]) and words[1:]:  # variables before a command
        words = words[1:]
    if words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[0].startswith(("scripts/", "./scripts/")):
        assert (ROOT / words[0]).is_file()
    elif words[:3] == ["python", "-m", "zephyr_jax.recipes"]:
        check_recipes(words[3:], copied)
    elif words[:3] == ["python", "-m", "zephyr_jax"]:
        check_ours(words[3], words[4:], copied)
    elif words[0] == "zephyr-jax":
        check_ours(words[1], words[2:], copied)
    elif words[0] == "python" and words[1].startswith("scripts/"):
        assert (ROOT / words[1]).is_file(), f"no {words[1]}"
        check_ours(words[1].removeprefix("scripts/").removesuffix(".py"), words[2:], copied)


def check_pip(words):
    """Extras of ours that are installed have to be there."""
    setup = (ROOT / "setup.cfg").read_text()
    for word in words:
        if extras := re.fullmatch(r"(?:\.|zephyr_jax)\[([\w,]+)\]", word):
            for extra in extras[1].split(","):
                assert re.search(rf"^{extra} ?=", setup, re.M), f"no extra {extra}"


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        known = rf"\$\((?:if \$\()?{name}\b|^{name} \?=" if equals else rf"^{name}:"
        assert re.search(known, makefile, re.M), f"make has no {name}"


def check_recipes(words, copied):
    named = {"list": [], "show": words[1:], "diff": words[1:], "copy": words[1:2]}
    for name in named[words[0]]:
        assert (ROOT / "configs" / f"{name}.py").is_file(), f"no recipe {name}"
    if words[0] == "copy":
        copied[f"{words[2].rstrip('/')}/{words[1]}.py"] = words[1]


def check_ours(command, words, copied):
    """A command's flags, the config it names, and the fields that it sets."""
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(command, allow_abbrev=False)
    module.add_arguments(parser)  # a parser that does not understand raises SystemExit
    if "--help" in words:
        return
    known, overrides = parser.parse_known_args(words)
    unknown = [word for word in overrides if not word.startswith("--config.")]
    assert not unknown, f"unknown: {unknown}"
    for name in (getattr(known, "config", None) and known.config.split(",")) or []:
        kind = FeedbackConfig if parser.prog.endswith("collect_feedback") else RunConfig
        build(kind, read_file(copied.get(name.strip(), name.strip()), overrides))


@pytest.mark.parametrize("page", PAGES)
def test_config_fields_in_the_text_are_there(page):
    for path in re.findall(r"`-?-?config\.(?!json\b)([\w.]+)(?=[`=\s])", text(page)):
        kind = RunConfig
        for name in path.split("."):
            if kind == dict[str, float]:  # dpo.options, train.bad_steps
                assert name in {*OPTIONS, *BAD_STEPS}, f"{page}: no config.{path}"
                break
            fields = typing.get_type_hints(kind)
            assert name in fields, f"{page}: no config.{path}"
            kinds = typing.get_args(fields[name]) or (fields[name],)
            kind = next(filter(dataclasses.is_dataclass, kinds), fields[name])


def test_the_site_has_every_page():
    """The navigation of mkdocs.yml names each page of docs/ once."""

    def named(entry):
        parts = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [x for part in parts for x in named(part)]

    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = [name.removeprefix("docs/") for name in {*PAGES, *MADE} if name[:5] == "docs/"]
    assert sorted(nav) == sorted(there)


def test_the_table_of_fields_has_every_field_and_what_it_means():
    for section, kind in site_pages.sections():
        rows = {field.name: field for field in site_pages.fields(kind)}
        assert list(rows) != []
        assert set(rows) == {field.name for field in dataclasses.fields(kind)}
        if section:
            assert not [name for name, row in rows.items() if not row.meaning], section
    rows = {field.name: field for field in site_pages.fields(TrainConfig)}
    assert rows["max_steps"].allowed == "0 or more"
    log_every = ("log_every", "int", "", "above 0", "steps between two lines of metrics.jsonl")
    assert rows["log_every"] == log_every
    assert rows["trackers"].default == "()"
    dpo = {field.name: field.allowed for field in site_pages.fields(DpoConfig)}
    assert dpo["max_prompt_length"] == "above 0; below dpo.max_length"  # both from local names
    assert "| `seq_len` | `int` | (required) | above 0 |" in site_pages.fields_page()


def test_the_table_of_fields_lists_the_values_that_a_config_takes():
    """A value that is not in the list is refused by a message that has the same list."""
    checked = 0
    for section, kind in site_pages.sections():
        for field in site_pages.fields(kind):
            values = re.findall("`'(\\w+)'`", field.allowed.split(";")[0])
            if values and field.type.startswith("str") and field.name not in ("divergence", "loss"):
                name = f"{section}.{field.name}".strip(".")
                words = [f"--config.{name}=nonsense"] + LORA * (section == "lora")
                with pytest.raises(ValueError, match="not known") as error:
                    load_config("demo_dpo", words)
                assert set(values) <= set(re.findall(r"\w+", str(error.value))), name
                checked += 1
    assert checked > 8


def test_the_checks_can_fail():
    """Each kind of mistake is seen."""
    for line in (
        *("python scripts/train.py --config=demo_sft --wrkdir=x", "python scripts/trane.py"),
        "python scripts/train.py --config=demo_sft --config.optim.lr=1",
        "python -m zephyr_jax generate --model=x",
        "python -m zephyr_jax.recipes show nothing",
        *("make demo SHRT=1", "pip install -e .[cudda]"),
    ):
        with pytest.raises((ValueError, OSError, AssertionError, KeyError, SystemExit)):
            check_command(line.split(), {})
    check_command(["make", "demo", "SHORT=1"], {})
    check_command(["python", "scripts/train.py", "--config=demo_sft", "--workdir=x"], {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if has_code(page)])
def test_the_blocks_of_a_page_run(page, tmp_path):
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, ROOT / "tests" / "docs_runner.py", PAGES[page]]
    output_of(words, cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_is_searched_from_a_folder(tmp_path):
    """As files, without a server: nothing comes from another host, and the search finds pages."""
    pytest.importorskip("material", reason="comes with the extra docs")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    output_of(build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    loads = re.compile(r'(?:<script[^>]* src|<link[^>]* href|<img[^>]* src)="([^"]+)"')
    for page in site.rglob("*.html"):
        loaded = loads.findall(page.read_text())
        assert not [address for address in loaded if "://" in address], page
    if not (chromium := shutil.which("chromium") or shutil.which("chromium-browser")):
        return
    flags = "--headless --no-sandbox --disable-gpu --dump-dom --virtual-time-budget=15000"
    words = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"file://{site / 'index.html'}?q=weight_decay"
    assert re.search(r"\d+ matching documents", output_of([*words, address]))
