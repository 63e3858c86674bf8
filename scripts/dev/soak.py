"""Kills a small run at random moments for a while: does it end where an undisturbed one does?

python scripts/dev/soak.py --minutes=120 [--steps=1500] [--longest=400] [--seed=0]

Needs no data: it makes up records of the demo's world. Each round trains `--steps` steps in a new
folder, is killed (SIGKILL or SIGTERM) until it is done, and must end with the parameters, to the
bit, and the lines of metrics of the undisturbed run. No process may grow by more than 2% while it
trains: from its 450th step on, when the heap has the size that a checkpoint needs, the median of
its resident memory in the last quarter of the time next to that in the second, where it was seen at
least 20 times. Exit status 1 if one of the two fails.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zephyr_jax.config.run import load_config
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.demo import corpus

SETTLED = 450  # steps
_TIMED = ("_per_s", "elapsed_s", "eta_s", "goodput", "wall_s", "productive_s", "crc32", "mfu")


def result(workdir: Path) -> tuple[str, list[dict]]:
    """The digest of the last step's parameters, and the lines of metrics without times."""
    program = (
        "import sys, zephyr_jax as zj; from zephyr_jax.weights.checkpoint import params_digest; "
        "print(params_digest(zj.load_model(sys.argv[1]).params))"
    )
    words = [sys.executable, "-c", program, str(workdir)]
    digest = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = {name for row in rows for name in row if name.endswith(_TIMED) or "time/" in name}
    return digest, [{k: v for k, v in row.items() if k not in timed} for row in rows]


def memory(process: subprocess.Popen) -> int:
    """Resident KiB of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in lines if x.startswith("VmRSS")), 0)


def lines(workdir: Path) -> int:
    """How many lines of metrics the run has."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def watch(command: list[str], workdir: Path, seconds: float) -> tuple[subprocess.Popen, list[int]]:
    """A start of the run until it ended or so long, and its memory once it has settled."""
    began, seen, least = time.time(), [], lines(workdir)
    with workdir.with_suffix(".log").open("ab") as log:  # what the starts wrote
        process = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=log, stderr=log)
    while process.poll() is None and time.time() < began + seconds:
        now = lines(workdir)
        least = min(now, least)  # a new start drops the lines of steps that it repeats
        if now >= least + SETTLED:
            seen.append(memory(process))
        time.sleep(0.5)
    return process, [kib for kib in seen if kib]


def growth(seen: list[int]) -> list[float]:
    """How much larger the last quarter is than the second, in percent; empty if few were seen."""
    n = len(seen) // 4
    if n < 5:
        return []
    change = 100 * (statistics.median(seen[-n:]) / statistics.median(seen[n : 2 * n]) - 1)
    return [change]


def prepared(root: Path, steps: int) -> list[str]:
    """The command that trains on records which are made up in the folder."""
    corpus.write_ultrachat(root / "raw" / "ultrachat", 600, 0)
    prepare("ultrachat", root / "raw" / "ultrachat", root / "data", "raw")
    tokenizer, vocabulary = root / "tokenizer" / "tokenizer.model", load_config("demo_sft").model
    lines = corpus.tokenizer_lines(root / "raw" / "ultrachat")
    corpus.train_tokenizer(lines, tokenizer, vocabulary.vocab_size)
    command = [sys.executable, "-m", "zephyr_jax", "train", "--config=demo_sft", "--samples=0"]
    command += [f"--config.data.tokenizer={tokenizer.parent}", "--config.train.log_every=1"]
    command += [f"--config.data.data_dir={root / 'data'}", "--config.train.checkpoint_every=5"]
    return [*command, f"--config.train.max_steps={steps}", "--config.train.epochs=1000"]


def main() -> None:
    """Runs rounds until the time is over; exit status 1 if one ended elsewhere, or grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--longest", type=float, default=400, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root, draw = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(args.seed)
    command, end = prepared(root, args.steps), time.monotonic() + 60 * args.minutes
    process, seen = watch(command, root / "whole", 3600)
    if process.wait():
        raise RuntimeError("the undisturbed run failed")
    wanted, rounds, kills, wrong = result(root / "whole"), 0, 0, 0
    grown = growth(seen)
    sys.stdout.write(f"undisturbed: {max(seen, default=0) // 1024} MiB, {grown} %\n")
    sys.stdout.flush()
    while time.monotonic() < end:
        workdir, starts = root / f"round_{rounds}", 0
        while True:
            process, seen = watch(command, workdir, draw.uniform(1, args.longest))
            starts += 1
            grown += growth(seen)
            if process.poll() is None:
                process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
                kills += 1
            status = process.wait()
            if status == 0:
                break
            if status not in (75, -signal.SIGKILL, -signal.SIGTERM):
                raise RuntimeError(f"a start ended with {status}: {workdir}.log")
        rounds += 1
        same = result(workdir) == wanted
        wrong += not same
        ends = "as the undisturbed run" if same else "DIFFERS"
        line = f"round {rounds}: {starts} starts, {kills} kills so far, {ends}; "
        grew = f"{max(grown, default=0):.2f}% in {len(grown)} starts that were long enough"
        sys.stdout.write(f"{line}memory grew by at most {grew}\n")
        sys.stdout.flush()
    sys.exit(bool(wrong) or max(grown, default=0) > 2)


if __name__ == "__main__":
    main()
