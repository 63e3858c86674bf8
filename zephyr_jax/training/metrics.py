"""What a run measures of itself: means and rates."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from zephyr_jax.losses.pairs import means_of

_TOTALS = ("tokens", "target_tokens")  # reported as rates, not as means


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
    """Rates since the last reading, the remaining time, and goodput; times are in seconds.

    `began` is when this start of the run began, `before` what earlier starts took: wall-clock time,
    and time inside steps. `step_at_peak` is what a step's model FLOPs take at the devices' peak.
    """

    def __init__(
        self,
        total_steps: int,
        began: float | None = None,
        before: tuple[float, float] = (0.0, 0.0),
        now: Callable[[], float] = time.monotonic,
        step_at_peak: float | None = None,
    ):
        self._step_at_peak = step_at_peak
        self._now, self._total, self._before = now, total_steps, before
        self._start = self._last = self._step = now()
        self._began = self._start if began is None else began
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._productive, self._compiled = 0.0, False

    def begin_step(self) -> None:
        """The batch is there; the time before it belongs to no step."""
        self._step = self._now()

    def end_step(self) -> None:
        """The step's work is done. The first one compiles, and does not count."""
        if self._compiled:
            self._productive += self._now() - self._step
        self._compiled = True

    def read(self, meter: Meter, step: int, pairs: bool) -> dict[str, float]:
        """Target tokens, all tokens but padding, and pairs, per second; seconds left."""
        now = self._now()
        seconds = max(now - self._last, 1e-9)
        self._last = now
        self._timed_steps += meter.steps
        self._timed_seconds += seconds
        rates = {
            **{f"{name}_per_s": meter.total(name) / seconds for name in _TOTALS},
            "elapsed_s": now - self._start,
            "eta_s": (self._total - step) * self._timed_seconds / max(self._timed_steps, 1),
            "goodput": self._productive / max(now - self._began, 1e-9),
            "wall_s": self._before[0] + now - self._began,
            "productive_s": self._before[1] + self._productive,
        }
        if self._step_at_peak is not None:
            rates["mfu"] = meter.steps * self._step_at_peak / seconds
        if pairs:
            rates["pairs_per_s"] = meter.total("weight") / seconds
        return rates

    def skip(self) -> None:
        """Leaves the time since the last reading out of the rates (evaluation, a checkpoint)."""
        self._last = self._now()
