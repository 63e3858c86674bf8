"""Independent tasks on the processes of this machine, or on Apache Beam."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    *,
    sizes: Sequence[int],
    title: str,
    unit: str,
) -> list[Result]:
    """The results of `function` in the order of the tasks; the first exception is raised.

    Args:
        function: picklable, as are tasks and results. Tasks are independent of each other.
        tasks: one argument of `function` each.
        workers: maximum number of processes; with one, all runs in this process.
        sizes: how far each task moves the progress bar.
        title: of the bar.
        unit: of the sizes.
    """

    def collect(results: Iterable[Result]) -> list[Result]:
        done = []
        with tqdm(total=sum(sizes), desc=title, unit=unit, unit_scale=unit == "B") as bar:
            for size, result in zip(sizes, results, strict=True):
                bar.update(size)
                done.append(result)
        return done

    workers = min(workers, len(tasks))
    if workers <= 1:
        return collect(map(function, tasks))
    # A forked child would inherit the threads' locks of JAX, TFDS and the progress bar.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        return collect(pool.map(function, tasks))


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for tasks forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_on_beam(
    function: Callable[[Task], None], tasks: Sequence[Task], options: Sequence[str]
) -> None:
    """Runs every task as one element of a Beam pipeline; Beam may run a task twice.

    Args:
        function: picklable; it leaves its result in a file that every worker can reach.
        tasks: one argument of `function` each.
        options: of Beam, without dashes: `runner=DirectRunner`, `direct_num_workers=4`.
    """
    try:
        beam: Any = importlib.import_module("apache_beam")
        settings: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--beam needs Apache Beam, in an environment of its own: pip install 'zephyr_jax[beam]'"
        ) from error
    pipeline_options = settings.PipelineOptions([f"--{option}" for option in options])
    with beam.Pipeline(options=pipeline_options) as pipeline:
        _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(function)
