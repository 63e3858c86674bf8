"""Several processes of one run, one for each host: how they find each other, and how they stop.

Every process runs the same command. On a TPU slice, under Slurm, Open MPI or Kubernetes JAX finds
the others by itself (`--distributed`); elsewhere the three flags, or the environment variables of
the same meaning, say who they are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

STOPPED = 75  # exit status of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h

# flag -> environment variable that stands in for it
_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    group = parser.add_argument_group("several processes (the same command on every host)")
    group.add_argument(
        "--distributed", action="store_true", help="as the cluster says: TPU slice, Slurm, ..."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if flags or environment name any; waits until all are there.

    Must come before anything asks JAX for its devices.

    Raises:
        ValueError: if flags or variables are incomplete or contradict each other, or the other
            processes are not found.
    """
    given = {name: getattr(args, name) for name in _VARIABLES}
    for name, variable in _VARIABLES.items():
        if given[name] is None and os.environ.get(variable):
            given[name] = _whole(variable) if name != "coordinator" else os.environ[variable]
    named = [name for name in given if given[name] is not None]
    if not named and not args.distributed:
        return
    if named and args.distributed:
        raise ValueError(f"--distributed asks the cluster; leave out {_spelled(named)}")
    lacking = [name for name in given if given[name] is None]
    if named and lacking:
        raise ValueError(f"several processes need {_spelled(list(given))}; missing: {lacking[0]}")
    if named and not 0 <= given["process_id"] < given["num_processes"]:
        raise ValueError(
            f"process_id={given['process_id']} is not one of 0 to {given['num_processes'] - 1}"
        )
    try:
        jax.distributed.initialize(
            given["coordinator"], given["num_processes"], given["process_id"]
        )
    except (ValueError, RuntimeError) as error:
        where = given["coordinator"] or "the cluster's environment"
        raise ValueError(f"the processes of {where} do not come together: {error}") from error
    logging.info(
        "process %d of %d, with %d of %d devices",
        *(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()),
    )
    if jax.process_index():
        logging.set_verbosity(logging.WARNING)  # what all would say, process 0 says


def check_started() -> None:
    """Raises a ValueError where JAX sees several hosts that have not joined each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this is one of {jax.process_count()} hosts of a slice; start the same command on "
            "each with --distributed"
        )


def _whole(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError as error:
        raise ValueError(f"{variable}={os.environ[variable]!r} is not a number") from error


def _spelled(names: list[str]) -> str:
    return ", ".join(f"--{name} ({_VARIABLES[name]})" for name in names)


class Stopping:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # signals that this process caught; of several, always empty

    def at(self, step: int) -> bool:
        """Whether to stop after this step; all processes ask at every step and get one answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.asked)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Makes SIGTERM and SIGINT ask for a stop instead of killing, so that a checkpoint is written.

    A second one is obeyed at once. With several processes JAX itself waits for SIGTERM, on any of
    them, and finds a step that all can still stop at; SIGINT kills.
    """
    stopping = Stopping()
    old: dict[int, Any] = {}

    def catch(number: int, _: Any) -> None:
        stopping.asked.append(number)
        signal.signal(number, old[number])

    if jax.process_count() == 1:
        with contextlib.suppress(ValueError):  # not the main thread, as in some notebooks
            for number in (signal.SIGTERM, signal.SIGINT):
                old[number] = signal.signal(number, catch)
    try:
        yield stopping
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
