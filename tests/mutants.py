"""Puts every pitfall into a copy of the package, one after another, and runs the test against it.

    python tests/mutants.py [--only 24,29]

Each mutation of mutant_table.py is made in a temporary copy, its one test run in a process of its
own, and the file put back. A test that stays green proves nothing: the mutant survives, and the
exit status is 1. So it is where a mutation no longer fits the source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 600
# Errors of a mutation that is no program any more: such a red says nothing about the test.
_NO_PROGRAM = ("SyntaxError", "IndentationError", "NameError", "ImportError", "TypeError")
# pytest, which first makes sure that it tests the copy and not an installed package.
_CHILD = """
import pathlib, sys, pytest
class Origin:
    def pytest_collection_finish(self):
        import zephyr_jax
        here, found = pathlib.Path.cwd().resolve(), pathlib.Path(zephyr_jax.__file__).resolve()
        assert found.is_relative_to(here), f"{found} would be tested instead of the copy in {here}"
options = ["-q", "-x", "-rfE", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[Origin()]))
"""


def misfits(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with mutations that cannot be made in the sources as they are."""
    wrong = []
    for mutant in mutants:
        path = root / "zephyr_jax" / mutant.file
        found = path.read_text().count(mutant.old) if path.is_file() else 0
        if found != 1 or mutant.old == mutant.new:
            wrong.append(
                f"pitfall {mutant.pitfall}: {mutant.old!r} occurs {found} times in "
                f"zephyr_jax/{mutant.file}, not once; bring tests/mutant_table.py up to date"
            )
    return wrong


def copy_project(folder: Path) -> None:
    """The package, its tests and their settings in `folder`, the recipes where a wheel has them."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("zephyr_jax", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copytree(ROOT / "configs", folder / "zephyr_jax" / "recipes", ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)


def run_tests(folder: Path, cache: str, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and output for these tests of the copy in `folder`."""
    before = os.environ.get("PYTHONPATH")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])]),
        # A file changed and restored within a second would be taken from its old bytecode.
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "COLUMNS": "160",
    }
    command = [sys.executable, "-c", _CHILD, *(f"tests/{test}" for test in tests)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no result after {_TIMEOUT_S} s"
    return done.returncode, done.stdout + done.stderr


def try_mutant(folder: Path, cache: str, mutant: Mutant) -> tuple[str, str]:
    """The verdict ("killed", "SURVIVED" or "ERROR") and what pytest said."""
    path = folder / "zephyr_jax" / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        status, output = run_tests(folder, cache, [mutant.test])
    finally:
        path.write_text(original)
    if status == 0:
        return "SURVIVED", "the test stays green"
    said = " / ".join(re.findall(r"^E +(\S.*)", output, re.MULTILINE)[:3]) or output.strip()[-200:]
    if status != 1 or said.startswith(_NO_PROGRAM):
        return "ERROR", said
    return "killed", said


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(mutants: Sequence[Mutant], folder: Path) -> bool:
    """Tries the mutants in a copy below `folder` and reports; whether all of them were killed."""
    copy, cache = folder / "copy", os.environ.get("JAX_COMPILATION_CACHE_DIR")
    cache = cache or str(folder / "jax_cache")
    copy_project(copy)
    tests = sorted({mutant.test for mutant in mutants})
    started = time.monotonic()
    status, output = run_tests(copy, cache, tests)
    if status or re.search(r"\d+ skipped", output):
        _say(output)
        _say("without mutations these tests must pass, none skipped (pip install .[test])")
        return False
    _say(f"{len(tests)} tests are green without mutations ({time.monotonic() - started:.0f} s)")
    verdicts, started = [], time.monotonic()
    for number, mutant in enumerate(mutants, 1):
        before = time.monotonic()
        verdict, why = try_mutant(copy, cache, mutant)
        took = time.monotonic() - before
        verdicts.append(verdict)
        _say(
            f"[{number}/{len(mutants)}] pitfall {mutant.pitfall}, {mutant.file}: {verdict} in "
            f"{took:.0f} s by {mutant.test}\n    {why[:110]}"
        )
    killed, minutes = verdicts.count("killed"), (time.monotonic() - started) / 60
    _say(f"{killed} of {len(verdicts)} mutants killed in {minutes:.1f} min")
    return killed == len(verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where every selected mutant was killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="numbers of pitfalls, as 24,29", default="")
    numbers = {int(number) for number in parser.parse_args(arguments).only.split(",") if number}
    mutants = [mutant for mutant in MUTANTS if not numbers or mutant.pitfall in numbers]
    missing = numbers - {mutant.pitfall for mutant in mutants}
    wrong = misfits(mutants) + [f"pitfall {number} has no mutant" for number in sorted(missing)]
    if wrong:
        _say("\n".join(wrong))
        return 1
    with tempfile.TemporaryDirectory(prefix="zephyr_jax_mutants_") as folder:
        return 0 if run(mutants, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
