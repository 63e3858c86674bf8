"""Conversion on Apache Beam's direct runner writes the bytes that local processes write.

Beam pins an older protobuf than SentencePiece does, so it has an environment of its own
(`make slow` builds it).
"""

import hashlib
import subprocess
from pathlib import Path

import pytest
from raw_rows import dialogue, write

BEAM = Path(__file__).resolve().parents[2] / ".venv-beam" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BEAM.exists(), reason="make slow builds Beam's own environment"),
]
# The command line on chunks of a kilobyte, so that there are many tasks.
PROGRAM = """
import sys
from zephyr_jax.data.prepare import builders
from zephyr_jax.data.raw import readers
from zephyr_jax.__main__ import main

builders.chunks_of = lambda path: readers.chunks_of(path, 1000)
main(["prepare_data", *sys.argv[1:]])
"""


def run(raw, out, *options):
    words = ["ultrachat", f"--source={raw}", f"--data_dir={out}", *options]
    subprocess.run([BEAM, "-c", PROGRAM, *words], check=True, timeout=300)
    files = (out / "ultrachat" / "raw" / "1.0.0").iterdir()
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_bytes(tmp_path):
    write(tmp_path / "raw" / "train_0.jsonl", map(dialogue, range(90)))
    local = run(tmp_path / "raw", tmp_path / "local", "--workers=1")
    assert run(tmp_path / "raw", tmp_path / "one", "--beam") == local
    several = ["--beam", "runner=DirectRunner", "direct_num_workers=2"]
    several.append("direct_running_mode=multi_processing")
    assert run(tmp_path / "raw", tmp_path / "several", *several) == local
