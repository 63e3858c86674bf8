"""Recorded stand-ins for gcloud, git and uv, and the commands that scripts/tpu run with them."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "scripts" / "tpu"
SLICE, HOST = TPU / "slice.sh", TPU / "zephyr_host.sh"
NEEDS_BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
WHERE = ["--project=my-project", "--zone=us-west4-a"]
NAMED = [*WHERE, "--type=v5litepod-16", "--name=sft"]
TRAIN = ["--config=configs/zephyr_7b_sft.py", "--workdir=gs://b/runs/sft"]
ODD = "--config.data.dataset=ultrachat/200k, messages/own=0.5 'x' \\ $HOME &"


class Tools:
    """Recorded stand-ins for the outside programs, first on PATH."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        fake = (ROOT / "tests" / "stored" / "tpu" / "fake_tool.py").read_text()
        for name in ("gcloud", "git", "uv"):
            (self.bin / name).write_text(f"#!{sys.executable} -S\n{fake}")
            (self.bin / name).chmod(0o755)

    def run(self, *words, home=None, **played):
        """Runs a script; `played` are the events, state and beats of fake_tool.py."""
        for name, value in played.items():
            (self.folder / f"{name}.json").write_text(json.dumps(value))
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE_TOOLS": str(self.folder),
            "TMPDIR": str(self.folder),
            "HOME": str(home or self.folder),
        }
        options = {"capture_output": True, "text": True, "timeout": 100, "check": False}
        return subprocess.run(["bash", *map(str, words)], env=environment, **options)

    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self):
        """The calls that change the slice or its hosts; queries are left out."""
        steps = []
        for words in self.calls():
            remote = [word for word in words if word.startswith("--command=")]
            if words[1:3] == ["storage", "cat"]:
                continue
            step = remote[0].split()[2] if remote else words[4] if words[0] == "gcloud" else "pack"
            if step not in ("describe", "status"):
                steps.append(step)
        return steps


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path / "tools")


def dry(tools, script, command, *words):
    """The words of every command that a dry run prints; it must run none."""
    done = tools.run(script, command, "--dry_run", *words)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not tools.calls()
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def tpus(*words):
    return ["gcloud", "compute", "tpus", *words, *WHERE]


def remote(*words):
    return f"--command=bash zephyr_host.sh {' '.join(words)}"
