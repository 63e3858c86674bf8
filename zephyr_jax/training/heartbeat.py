"""`heartbeat.json` in the workdir: how far the run is, for who must tell a hang from slow work."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import jax
from etils import epath

from zephyr_jax.storage import write_atomic

EVERY = 30.0  # seconds between two beats, at least


class Heartbeat:
    """Process 0 writes a line at most every `EVERY` seconds, from the loop that makes the steps.

    No thread of its own does it: where the devices hang, so does the loop, and the file stays.

    Args:
        workdir: of the run.
        total_steps: of the run.
        every: seconds between two beats.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        workdir: epath.Path,
        total_steps: int,
        every: float = EVERY,
        now: Callable[[], float] = time.monotonic,
    ):
        self._path, self._total = workdir / "heartbeat.json", total_steps
        self._every, self._now = every, now
        self._last: float | None = None
        self._since: tuple[float, int] | None = None  # when this process was at which step

    def beat(self, step: int, doing: str = "train") -> None:
        """Says that `step` steps are made; `doing` is "train", "eval", "stopped" or "done".

        The last two are written at once.
        """
        now = self._now()
        self._since = self._since or (now, step)
        ends = doing in ("stopped", "done")
        if jax.process_index() or not (
            ends or self._last is None or now - self._last >= self._every
        ):
            return
        self._last = now
        rate = (step - self._since[1]) / max(now - self._since[0], 1e-9)
        left = (self._total - step) / rate if rate else None
        said = {
            "step": step,
            "total_steps": self._total,
            "doing": doing,
            "time": round(time.time(), 1),
            "steps_per_s": round(rate, 6),
            "eta_s": left and round(left, 1),
            "host": socket.gethostname(),
            "processes": jax.process_count(),
        }
        write_atomic(self._path, json.dumps(said) + "\n")
