"""Many independent tasks on several processes, with one progress bar."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """How many cores this process may use."""
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
    """What `function` gives for each task, in the order of the tasks.

    The first exception stops what has not begun and is raised. With one worker, or one task, all
    is done in this process.

    Args:
        function: picklable, as are tasks and results; a task must stand on its own.
        tasks: what to do.
        workers: processes at most.
        sizes: how far each task moves the progress bar.
        title: of the bar.
        unit: of the sizes.
    """
    results: list[Result | None] = [None] * len(tasks)
    with tqdm(
        total=sum(sizes), desc=title, unit=unit, unit_scale=unit == "B", mininterval=1.0
    ) as bar:
        for index, result in _completed(function, tasks, min(workers, len(tasks))):
            results[index] = result
            bar.update(sizes[index])
    return results  # type: ignore[return-value]  # every index was completed


def _end_with_parent() -> None:
    """Makes a worker end when its parent was killed; it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _completed(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[int, Result]]:
    if workers <= 1:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    # A forked child would inherit the threads' locks of JAX, TFDS and the progress bar.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        futures = {pool.submit(function, task): index for index, task in enumerate(tasks)}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
