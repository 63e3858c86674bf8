"""`metrics.jsonl`: what a run measured, a line for each step and split that was reported."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from zephyr_jax.storage import is_remote, write_atomic

_REWRITE = 10.0  # seconds between two writes of a metrics.jsonl in a bucket, at least


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
    """The rows of a `metrics.jsonl`; a last line cut off by a kill is left out.

    A ValueError names another line that is damaged.
    """
    rows, path = [], epath.Path(path)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"], "split": row["split"]} | row)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}, is damaged: restore the file, or remove that line"
                ) from error
    return rows
