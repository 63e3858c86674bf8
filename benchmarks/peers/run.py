"""The race against peers: the same model, weights, data and optimizer, one thread each, in turns.

    python benchmarks/peers/run.py                  everything (hours of one core), then a table
    python benchmarks/peers/run.py --only=sft --peer=torch --shape=tiny
    python benchmarks/peers/run.py --table               the table of all parts raced so far

Each side gets an environment of its own in .venv-peers/ and runs in a process of its own. Losses
have to be equal in the first three turns, of which the first compiles; then both sides take turns,
and every turn is one ratio. Seconds are those of the process's CPU: with one thread on one core
they equal the clock's on a quiet machine, and a busy neighbor counts little. What cannot be
installed or run is a row with its error. Ours runs in the environment that starts this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import work

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / ".venv-peers" / "results.jsonl"
TRAINING = ("sft", "dpo", "dpo-real")
GENERATION = ("generate-4", "generate-32")


class Peer(NamedTuple):
    """A side of the race: its script, what pip installs for it, and what it can do."""

    script: str
    packages: tuple[str, ...]
    kinds: tuple[str, ...]


PEERS = {
    "torch": Peer(
        "torch_trl.py",
        ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "accelerate", "datasets"),
        (*TRAINING, *GENERATION),
    ),
    "levanter": Peer(
        "levanter_sft.py",
        ("levanter==1.2.dev1644", "haliax==1.4.dev453", "jax==0.7.2", "chex", "GitPython"),
        ("sft",),
    ),
    "tunix": Peer("tunix_llama.py", ("google-tunix==0.1.7",), (*TRAINING, *GENERATION)),
    "flax": Peer(
        "flax_mistral.py",
        ("transformers==4.57.6", "jax==0.10.2", "flax==0.12.8", "optax"),
        ("sft", *GENERATION),
    ),
}


class Side:
    """A process that takes turns."""

    def __init__(self, python: Path | str, script: str, kind: str, shape: str, folder: str):
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        single |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
        single |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        command = [str(python), str(HERE / script), kind, shape, folder]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=os.environ | single, text=True, **pipes)
        self.versions = self._answer()

    def turn(self) -> dict[str, list[float]]:
        """Seconds of CPU, seconds by the clock and loss of every part."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or [f"exit {self._process.returncode}"]
        raise RuntimeError(lines[-1][:200])

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def environment(name: str) -> Path:
    """The Python of a peer's environment, made where it is missing."""
    folder = ROOT / ".venv-peers" / name
    python, installed = folder / "bin" / "python", folder / ".installed"
    if not installed.is_file():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--pre", *PEERS[name].packages]
        if name == "torch":  # of the index that this machine uses, which may have none for CPUs
            pip.remove("--pre")
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip: {done.stderr.strip().splitlines()[-1][:200]}")
        installed.touch()
    return python


def race(kind: str, name: str, shape: str, rounds: int) -> dict[str, Any]:
    """The turns of both sides."""
    sides: list[Side] = []
    sizes = work.SHAPES[shape]
    result: dict[str, Any] = {"kind": kind, "peer": name, "shape": shape}
    with tempfile.TemporaryDirectory() as folder:
        # Generation needs logits that differ by more than the sides' rounding.
        spread = 0.1 if kind in GENERATION else 0.02
        data = work.make_data(sizes, kind)
        weights = work.make_weights(sizes, spread)
        for file, arrays in (("weights", weights), ("data", data)):
            np.savez(Path(folder) / file, allow_pickle=False, **arrays)
        try:
            for python, script in (
                (sys.executable, "ours.py"),
                (environment(name), PEERS[name].script),
            ):
                sides.append(Side(python, script, kind, shape, folder))
            turns = [[side.turn() for side in sides] for _ in range(rounds + 3)]
            result["differ"] = differ(turns[:3])
            result |= {"turns": turns[3:], "targets": work.targets_of(kind, data)}
            result["versions"] = {**sides[0].versions, **sides[1].versions}
            result["our jax"] = sides[0].versions["jax"]
        except RuntimeError as error:
            result["error"] = str(error)
        for side in sides:
            side.close()
    return result


def differ(turns: list[Any]) -> float:
    """The largest relative difference of the losses of any two parts that do the same work."""
    worst = 0.0
    for turn in turns:
        for part, (*_, loss) in turn[0].items():
            if part != "reference":
                same = [x[2] for k, x in turn[1].items() if k.split(",")[0] == part]
                worst = max(worst, *(abs(x - loss) / max(abs(loss), 1e-9) for x in same))
    return worst


def seconds(turn: dict[str, list[float]], part: str, clock: int = 0) -> float:
    """Those of a part; "decode" is a whole reply without its prefill."""
    first, *rest = part.split(",")
    if first == "decode":
        ends = ",".join(["", *rest])
        return turn[f"whole{ends}"][clock] - turn[f"prefill{ends}"][clock]
    return turn[part][clock]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A row for each thing that the two sides were compared in."""
    kind, peer, shape = result["kind"], result["peer"], result["shape"]
    if "error" in result:
        return [[kind, shape, peer, "", "", result["error"].replace("|", "/"), "", ""]]
    turns, rows = result["turns"], []
    parts = list(turns[0][1])
    if kind in GENERATION:
        parts = [p for p in parts if p.startswith("prefill")]
        parts += [p.replace("prefill", "decode") for p in parts]
    for part in parts:
        own = part.split(",")[0]
        compared = [(part, lambda turn, own=own: seconds(turn[0], own))]
        if "reference" in turns[0][0]:
            both = lambda turn, own=own: seconds(turn[0], own) + seconds(turn[0], "reference")  # noqa: E731
            compared.append((f"{part}; ours with its one pass of the reference", both))
        for label, ours in compared:
            ratios = sorted(seconds(turn[1], part) / ours(turn) for turn in turns)
            n = result["targets"] * (1 if own != "prefill" else work.PROMPT / work.NEW)
            rate, other = (
                n / statistics.median(x)
                for x in ([ours(t) for t in turns], [seconds(t[1], part) for t in turns])
            )
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} turns"
            middle = f"**{statistics.median(ratios):.2f}**"
            row = [kind, shape, f"{peer}: {label}", f"{rate:.0f}", f"{other:.0f}", middle, spread]
            rows.append([*row, f"{result['differ']:.0e}"])
    return rows


def table(path: Path) -> str:
    """The last result of every part, in Markdown."""
    last: dict[Any, Any] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        last[work.KINDS.index(result["kind"]), result["shape"], result["peer"]] = result
    head = ["work", "shape", "peer", "ours", "theirs", "ratio", "spread", "losses differ by"]
    rows = [head, ["---"] * len(head)]
    versions = {}
    for key in sorted(last, key=lambda key: (key[0], list(work.SHAPES).index(key[1]), key[2])):
        rows += rows_of(last[key])
        versions |= {k: v for k, v in last[key].get("versions", {}).items() if k != "transformers"}
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return "\n".join([*lines, "", f"Tokens that carry loss (or are new) a CPU second. {named}"])


def main() -> None:
    """Races what was asked for, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=work.KINDS, help="one kind of work")
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--shape", choices=work.SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="race nothing")
    args = parser.parse_args()
    args.results.parent.mkdir(exist_ok=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for kind in (args.only,) if args.only else work.KINDS:
        for shape in (args.shape,) if args.shape else ("tiny", "d512", "d1024"):
            for name in (args.peer,) if args.peer else PEERS:
                if not args.table and kind in PEERS[name].kinds:
                    result = race(kind, name, shape, args.rounds)
                    with args.results.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    sys.stdout.write(table(args.results) + "\n")


if __name__ == "__main__":
    main()
