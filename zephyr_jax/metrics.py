"""Sums become means, means become lines of `metrics.jsonl`; rates and the time that is left."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

_TOTALS = ("tokens", "target_tokens")  # reported as rates, not as means


class Meter:
    """Adds up the sums of several steps (float64, on the host) and divides once."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self.steps = 0

    def add(self, sums: dict[str, Any]) -> None:
        """Adds a step's sums; waits for the device that computes them."""
        for name, value in jax.device_get(sums).items():
            self._sums[name] += float(value)
        self.steps += 1

    def total(self, name: str) -> float:
        """The plain sum of one metric."""
        return self._sums[name]

    def means(self) -> dict[str, float]:
        """Every metric divided by the weight (target tokens, or pairs)."""
        weight = max(self._sums["weight"], 1.0)
        names = [n for n in self._sums if n != "weight" and n not in _TOTALS]
        return {name: self._sums[name] / weight for name in names}


class Clock:
    """Rates since the last look, and the time that the remaining steps will take."""

    def __init__(self, total_steps: int):
        self._total, self._start, self._last = total_steps, time.monotonic(), time.monotonic()
        self._timed_steps, self._timed_seconds = 0, 0.0

    def read(self, meter: Meter, step: int, pairs: bool) -> dict[str, float]:
        """Tokens that carry loss, all tokens but padding, and pairs, per second; seconds left."""
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        self._last = now
        self._timed_steps += meter.steps
        self._timed_seconds += seconds
        rates = {
            "target_tokens_per_s": meter.total("target_tokens") / seconds,
            "tokens_per_s": meter.total("tokens") / seconds,
            "elapsed_s": now - self._start,
            "eta_s": (self._total - step) * self._timed_seconds / max(self._timed_steps, 1),
        }
        return rates | ({"pairs_per_s": meter.total("weight") / seconds} if pairs else {})

    def skip(self) -> None:
        """Leaves the time since the last look out of the rates (evaluation, a checkpoint)."""
        self._last = time.monotonic()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line with "step" and "split"; only process 0 writes.

    A resumed run first drops the lines of steps that it is about to repeat.
    """

    def __init__(self, path: Path, resume_step: int):
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        self._seen = {(row["step"], row["split"]) for row in kept}
        if jax.process_index():
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)

    def has(self, step: int, split: str) -> bool:
        """Whether an earlier run wrote this line."""
        return (step, split) in self._seen

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends one line."""
        if jax.process_index():
            return
        row = {"step": step, "split": split} | {k: float(f"{v:.7g}") for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
