"""What a run measures of itself: means and rates."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from zephyr_jax.losses.pairs import means_of

_TOTALS = ("tokens", "target_tokens")  # reported as rates, not as means
_TRAINING = ("compile", "first_step", "data_wait", "step")  # parts of the time that rates count


class Meter:
    """Adds up the sums of several steps, a step late so that no device waits, and divides once.

    Of a bad step only its source, loss and norm of the gradient are kept, in `bad`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._pending, self._source, self.steps = {}, None, 0
        self.bad: list[tuple[Any, float, float]] = []

    def add(self, sums: dict[str, Any], source: Any = None) -> None:
        """Adds a step's sums; `source` is what `bad` names it by."""
        self.flush()
        self._pending, self._source = sums, source
        self.steps += 1

    def flush(self) -> None:
        """Waits for the device that computes the last sums."""
        sums = {name: float(value) for name, value in jax.device_get(self._pending).items()}
        if sums.pop("bad", 0.0):
            weight = max(sums["weight"], 1.0)
            self.bad.append((self._source, sums["loss"] / weight, sums["grad_norm"] / weight))
            sums = {}
        for name, value in sums.items():
            self._sums[name] += float(value)
        self._pending = {}

    def total(self, name: str) -> float:
        """The plain sum of one metric."""
        self.flush()
        return self._sums[name]

    def means(self) -> dict[str, float]:
        """Every metric divided by its weight (target tokens, pairs, or answers of one label)."""
        self.flush()
        return means_of({name: x for name, x in self._sums.items() if name not in _TOTALS})


class Clock:
    """Where a start of a run spends its time, its rates and goodput; times are in seconds.

    `began` is when the start began. `before` is what earlier starts took: wall-clock time, and time
    inside steps. `step_at_peak` is what a step's model FLOPs take at the devices' peak.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._began = self._mark = now() if began is None else began
        self.parts: dict[str, float] = defaultdict(float)
        self.total_steps, self.before = 0, (0.0, 0.0)
        self.step_at_peak: float | None = None
        self._trained, self._steps = 0.0, 0  # at the last reading

    def end(self, part: str) -> None:
        """All that was done since the last call is a part of this name."""
        now = self._now()
        self.parts[part] += now - self._mark
        self._mark = now

    def end_first_step(self, result: Any) -> None:
        """Waits for the first step, whose call compiled it."""
        self.end("compile")
        jax.block_until_ready(result)
        self.end("first_step")
        logging.info("the first step is done: %s", self)

    def close(self) -> None:
        """Ends with the wait for the last checkpoint."""
        self.end("save")
        logging.info("time of this start: %s", self)

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {x:.3g} s" for name, x in self.parts.items())

    def read(self, meter: Meter, step: int, pairs: bool) -> dict[str, float]:
        """Rates per second without evaluations and checkpoints, seconds left, parts, goodput."""
        trained = sum(self.parts.get(name, 0.0) for name in _TRAINING)
        stepping = self.parts.get("step", 0.0)
        seconds, wall = max(trained - self._trained, 1e-9), self._now() - self._began
        self._trained, self._steps = trained, self._steps + meter.steps
        rates = {
            **{f"{name}_per_s": meter.total(name) / seconds for name in _TOTALS},
            "elapsed_s": wall,
            "eta_s": (self.total_steps - step) * trained / max(self._steps, 1),
            "goodput": stepping / max(wall, 1e-9),
            "wall_s": self.before[0] + wall,
            "productive_s": self.before[1] + stepping,
            **{f"time/{name}": x for name, x in self.parts.items()},
        }
        if self.step_at_peak is not None:
            rates["mfu"] = meter.steps * self.step_at_peak / seconds
        if pairs:
            rates["pairs_per_s"] = meter.total("weight") / seconds
        return rates
