"""Kills a small run at random moments for a while: does it end where an undisturbed one does?

python scripts/dev/soak.py --minutes=120 [--seed=0]

Needs no data: it prepares the demo's records. Each round trains `--steps` steps in a new folder, is
killed (SIGKILL or SIGTERM) until it is done, and must end with the parameters, to the bit, and the
lines of metrics of the undisturbed run. The largest memory of its starts is printed too.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    return digest, [{k: v for k, v in row.items() if not k.endswith(_TIMED)} for row in rows]


def memory(process: subprocess.Popen) -> int:
    """Resident MiB of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) // 1024 for x in lines if x.startswith("VmRSS")), 0)


def main() -> None:
    """Runs rounds until the time is over; exit status 1 if one ended elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--longest", type=float, default=60, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root, draw = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(args.seed)
    zephyr = [sys.executable, "-m", "zephyr_jax"]
    subprocess.run([*zephyr, "demo", "--short", f"--workdir={root}"], check=True)
    command = [*zephyr, "train", "--config=demo_sft", "--samples=0"]
    command += [f"--config.data.tokenizer={root / 'raw' / 'tokenizer'}"]
    command += [f"--config.data.data_dir={root / 'data'}", "--config.train.checkpoint_every=5"]
    command += [f"--config.train.max_steps={args.steps}", "--config.train.log_every=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"--workdir={root / 'whole'}"], check=True, **quiet)
    wanted, end = result(root / "whole"), time.monotonic() + 60 * args.minutes
    rounds, kills, wrong = 0, 0, 0
    while time.monotonic() < end:
        workdir, peaks = root / f"round_{rounds}", []
        while True:
            process = subprocess.Popen([*command, f"--workdir={workdir}"], **quiet)
            limit, seen = time.monotonic() + draw.uniform(1, args.longest), [0]
            while process.poll() is None and time.monotonic() < limit:
                seen.append(memory(process))
                time.sleep(0.5)
            peaks.append(max(seen))
            if process.poll() is None:
                process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
                kills += 1
            if process.wait() == 0:
                break
        rounds += 1
        same = result(workdir) == wanted
        wrong += not same
        sys.stdout.write(
            f"round {rounds}: {len(peaks)} starts, {kills} kills so far, "
            f"{'as the undisturbed run' if same else 'DIFFERS'}; RSS at most {max(peaks)} MiB\n"
        )
        sys.stdout.flush()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
