"""Traces of some steps for XProf: what each device, and the host, did when."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from zephyr_jax.storage import files_below, is_remote

STEP = "train_step"  # what the steps are called in the trace


class Profiler:
    """Process 0 traces the steps that `train.profile` names into WORKDIR/profile.

    Args:
        span: the first step to trace and the first that no longer is, counted from 1; (): none.
        total_steps: of the run.
        workdir: of the run.

    Raises:
        ValueError: if the run has not so many steps.
    """

    def __init__(self, span: tuple[int, ...], total_steps: int, workdir: epath.Path):
        if span and span[1] - 1 > total_steps:
            raise ValueError(f"train.profile={span} goes beyond the run's {total_steps} steps")
        self._span = () if jax.process_index() else span
        self._folder, self._local = workdir / "profile", ""
        self._from = 0

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """One step, by its name in the trace where it is one of those."""
        if not (self._span and self._span[0] <= step < self._span[1]):
            yield
            return
        if not self._local:
            self._begin(step)
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield

    def after(self, step: int, result: Any, last: bool = False) -> None:
        """Ends the trace behind its last step, or the run's (`last`), when `result` is there."""
        if self._local and self._span and (last or step >= self._span[1] - 1):
            jax.block_until_ready(result)
            self._end(step)

    def _begin(self, step: int) -> None:
        # XLA writes to disks alone
        remote = is_remote(self._folder)
        self._local = tempfile.mkdtemp() if remote else str(self._folder)
        self._from = step
        jax.profiler.start_trace(self._local)

    def _end(self, step: int) -> None:
        jax.profiler.stop_trace()
        if is_remote(self._folder):
            local = epath.Path(self._local)
            for path in files_below(local):
                target = self._folder / path.relative_to(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            local.rmtree()
        self._span = ()
        logging.info(
            "steps %d to %d are traced in %s; look at them with: pip install xprof && xprof "
            "--logdir=%s (TensorBoard shows them too, where xprof is installed)",
            *(self._from, step, self._folder, self._folder),
        )
