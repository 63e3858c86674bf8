"""Traces of some steps for XProf: what each device, and the host, did when."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.storage import files_below, is_remote, write_atomic

STEP = "train_step"  # what the steps are called in the trace


class Profiler:
    """Process 0 traces steps `span[0]` to `span[1] - 1` (`train.profile`) into WORKDIR/profile.

    A run without so many steps is a ValueError.
    """

    def __init__(self, span: tuple[int, ...], total_steps: int, workdir: epath.Path):
        if span and span[1] - 1 > total_steps:
            raise ValueError(f"train.profile={span} goes beyond the run's {total_steps} steps")
        self._span = () if jax.process_index() else span
        self._folder, self._local, self._first = workdir / "profile", "", 0

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Names one step in the trace, if it is to be traced."""
        if not (self._span and self._span[0] <= step < self._span[1]):
            yield
            return
        if not self._local:
            # XLA writes to local disks only.
            self._local = tempfile.mkdtemp() if is_remote(self._folder) else str(self._folder)
            self._first = step
            jax.profiler.start_trace(self._local)
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield

    def after(self, step: int, result: Any, last: bool = False) -> None:
        """Ends the trace after its last step, or the run's (`last`), when `result` is there."""
        if not self._local or not self._span or not (last or step >= self._span[1] - 1):
            return
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        self._span = ()
        if is_remote(self._folder):
            local = epath.Path(self._local)
            for path in files_below(local):
                write_atomic(self._folder / path.relative_to(local), path.read_bytes())
            local.rmtree()
        logging.info("steps %d to %d are traced in %s", self._first, step, self._folder)
        logging.info("show them with: pip install xprof && xprof --logdir=%s", self._folder)
