"""The tasks of the data station on Apache Beam, for sets that outgrow one machine.

Tasks read the source and write the folder of work by their paths, so all workers must see both
under the same paths: a shared or mounted file system. See `docs/data.md`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging


def run_on_beam(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    sizes: Sequence[int],
    title: str,
    unit: str,
    options: Sequence[str] = (),
) -> list[Any]:
    """A `Runner` of `zephyr_jax.data.prepare.stages`: a pipeline with one element for each task.

    When it is through, what the tasks left in the folder of work is read here.

    Args:
        function: picklable, and harmless to repeat: Beam may run a task twice.
        tasks: what to do.
        sizes: of the tasks, for the message.
        title: of the stage, for the message.
        unit: of the sizes, for the message.
        options: of Beam, without dashes: `runner=DirectRunner`, `direct_num_workers=4`.

    Raises:
        ModuleNotFoundError: Beam is not installed.
    """
    try:
        beam: Any = importlib.import_module("apache_beam")
        settings: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--beam needs Apache Beam, in an environment of its own: pip install 'zephyr_jax[beam]'"
        ) from error
    logging.info("%s: %d tasks, %d %s, on Beam", title, len(tasks), sum(sizes), unit)
    with beam.Pipeline(
        options=settings.PipelineOptions([f"--{option}" for option in options])
    ) as pipeline:
        _ = (
            pipeline
            | beam.Create(list(range(len(tasks))))
            | beam.Reshuffle()
            | beam.Map(_Numbered(function, tasks))
        )
    return [function(task) for task in tasks]  # all is done: each only reads what it left


class _Numbered:
    """The function of a task, by the task's number; results stay on disk."""

    def __init__(self, function: Callable[[Any], Any], tasks: Sequence[Any]):
        self._function, self._tasks = function, list(tasks)

    def __call__(self, number: int) -> int:
        self._function(self._tasks[number])
        return number
