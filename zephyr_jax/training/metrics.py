"""What a run measures of itself: means, rates, `metrics.jsonl`, `heartbeat.json`, traces."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.storage import files_below, is_remote, write_atomic

_TOTALS = ("tokens", "target_tokens")  # reported as rates, not as means
_REWRITE = 10.0  # seconds between two writes of a metrics.jsonl in a bucket, at least
_BEAT = 30.0  # seconds between two writes of heartbeat.json, at least
TRACED = "train_step"  # what steps are called in a trace


class Meter:
    """Adds up the sums of several steps (float64, on the host) and divides once.

    A step's sums are read when the next step's are added, so that the device never waits.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._pending: dict[str, Any] = {}
        self.steps = 0

    def add(self, sums: dict[str, Any]) -> None:
        """Adds a step's sums."""
        self.flush()
        self._pending = sums
        self.steps += 1

    def flush(self) -> None:
        """Waits for the device that computes the last sums."""
        for name, value in jax.device_get(self._pending).items():
            self._sums[name] += float(value)
        self._pending = {}

    def total(self, name: str) -> float:
        """The plain sum of one metric."""
        self.flush()
        return self._sums[name]

    def means(self) -> dict[str, float]:
        """Every metric divided by the weight (target tokens, or pairs)."""
        self.flush()
        weight = max(self._sums["weight"], 1.0)
        names = [n for n in self._sums if n != "weight" and n not in _TOTALS]
        return {name: self._sums[name] / weight for name in names}


class Clock:
    """Rates since the last reading, the remaining time, and goodput; times are in seconds.

    `began` is when this start of the run began, by `now`, and `before` what earlier starts took:
    wall-clock time, and time inside steps. `step_at_peak` is what the model FLOPs of a step take at
    the devices' peak; without it no MFU is reported.
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
            "target_tokens_per_s": meter.total("target_tokens") / seconds,
            "tokens_per_s": meter.total("tokens") / seconds,
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


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line with "step" and "split"; only process 0 writes.

    A resumed run first drops the lines of steps that it is about to repeat. In a bucket, where
    nothing can be appended, the whole object is rewritten, by `flush` and every ten seconds.
    `trackers` get every new line too. `before` holds the seconds that earlier starts of the run
    took, and those inside steps; steps that were lost were not productive.
    """

    def __init__(self, path: epath.Path, resume_step: int, trackers: Sequence[Any] = ()):
        self._path, rows, self._trackers = path, read_metrics(path), trackers
        kept = [row for row in rows if row["step"] <= resume_step]
        self._seen = {(row["step"], row["split"]) for row in kept}
        self.before = (
            max((row.get("wall_s", 0.0) for row in rows), default=0.0),
            max((row.get("productive_s", 0.0) for row in kept), default=0.0),
        )
        self._text = "".join(json.dumps(row) + "\n" for row in kept)
        self._remote, self._written = is_remote(path), time.monotonic()
        if not jax.process_index():
            write_atomic(path, self._text)

    def has(self, step: int, split: str) -> bool:
        """Whether an earlier start of the run wrote this line."""
        return (step, split) in self._seen

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Adds one line."""
        if jax.process_index():
            return
        row = {"step": step, "split": split} | {k: float(f"{v:.7g}") for k, v in values.items()}
        line = json.dumps(row) + "\n"
        if self._remote:
            self._text += line
            if time.monotonic() - self._written > _REWRITE:
                self.flush()
        else:
            with self._path.open("a") as file:
                file.write(line)
        for tracker in self._trackers:
            tracker.log(step, split, values)

    def flush(self) -> None:
        """Writes the lines that are pending because the file is in a bucket."""
        if self._remote and not jax.process_index():
            write_atomic(self._path, self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is pending, here and in the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows, path = [], epath.Path(path)
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Heartbeat:
    """`heartbeat.json`: how far the run is, which tells a hang from slow work.

    Process 0 writes it every 30 seconds from the loop that runs the steps: if the devices hang, the
    file stays as it is.
    """

    def __init__(self, workdir: epath.Path, total_steps: int, now: Any = time.monotonic):
        self._path, self._total, self._now = workdir / "heartbeat.json", total_steps, now
        self._last = -math.inf

    def beat(self, step: int, doing: str = "train") -> None:
        """Reports a step; `doing` is "train", "eval", or at once "stopped" or "done"."""
        recent = self._now() - self._last < _BEAT
        if jax.process_index() or (recent and doing not in ("stopped", "done")):
            return
        self._last = self._now()
        status = {"step": step, "total_steps": self._total, "doing": doing, "time": time.time()}
        write_atomic(self._path, json.dumps(status) + "\n")


class Profiler:
    """Process 0 traces steps `span[0]` to `span[1] - 1` for XProf, into WORKDIR/profile."""

    def __init__(self, span: tuple[int, ...], workdir: epath.Path):
        self._steps = range(0) if jax.process_index() or not span else range(*span)
        self._folder, self._local = workdir / "profile", ""

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Names one step in the trace, if it is to be traced."""
        if step not in self._steps:
            yield
            return
        if not self._local:
            # XLA writes to local disks only.
            self._local = tempfile.mkdtemp() if is_remote(self._folder) else str(self._folder)
            self._steps = range(step, self._steps.stop)
            jax.profiler.start_trace(self._local)
        with jax.profiler.StepTraceAnnotation(TRACED, step_num=step):
            yield

    def after(self, step: int, result: Any, last: bool = False) -> None:
        """Ends the trace after its last step, or the run's (`last`), when `result` is there."""
        if step not in self._steps or not (last or step == self._steps[-1]):
            return
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        if is_remote(self._folder):
            local = epath.Path(self._local)
            for path in files_below(local):
                write_atomic(self._folder / path.relative_to(local), path.read_bytes())
            local.rmtree()
        logging.info("steps %d to %d are traced in %s", self._steps[0], step, self._folder)
        logging.info("show them with: pip install xprof && xprof --logdir=%s", self._folder)
