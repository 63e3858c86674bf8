"""The code of README, CONTRIBUTING and docs/ runs: every Python block, and the marked shell blocks.

Each page runs in one process and an empty folder (docs_runner.py). A Python block that cannot run
here has `<!-- not run: WHY -->` above it; `tests/project/test_docs.py` says which those are.
"""

import os
import subprocess
import sys

import pytest
from docs_pages import ROOT, blocks, pages

pytestmark = pytest.mark.slow


def has_code(page):
    return any(
        block.mark != "not run" and (block.language == "python" or block.mark in ("run", "setup"))
        for block in blocks(page)
    )


PAGES = [str(page.relative_to(ROOT)) for page in pages() if has_code(page)]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path):
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "docs_runner.py", ROOT / page],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
