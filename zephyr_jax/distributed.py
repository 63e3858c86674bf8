"""Several processes of one run, one for each host: how they meet, agree and stop.

Every process runs the same command. In a cluster that JAX knows `--distributed` finds the others;
elsewhere three flags, or the environment variables of the same meaning, say who they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

STOPPED = 75  # exit status of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h
_NONE, _FAILED = -1, -2  # in `first_decides`, which broadcasts one integer
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
        "--distributed",
        action="store_true",
        help="detect the cluster from its environment (TPU, Slurm, Open MPI, Kubernetes)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process_id", type=int, metavar="I", help="number of this one, from 0")


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if flags or environment name any; must come before JAX is used.

    Raises a ValueError if flags or variables do not fit, or the other processes are not found.
    """
    values = {name: getattr(args, name) for name in _VARIABLES}
    for name, variable in _VARIABLES.items():
        value = os.environ.get(variable)
        if values[name] is None and value:
            if name != "coordinator" and not value.isdigit():
                raise ValueError(f"{variable}={value!r} is not a number")
            values[name] = value if name == "coordinator" else int(value)
    named = [name for name in values if values[name] is not None]
    if not named and not args.distributed:
        return
    if named and args.distributed:
        raise ValueError(f"--distributed asks the cluster; leave out {_flags(named)}")
    lacking = [name for name in values if values[name] is None]
    if named and lacking:
        raise ValueError(f"several processes need {_flags(list(values))}; missing: {lacking[0]}")
    if named and not 0 <= values["process_id"] < values["num_processes"]:
        raise ValueError(
            f"process_id={values['process_id']} is not one of 0 to {values['num_processes'] - 1}"
        )
    try:
        jax.distributed.initialize(
            values["coordinator"], values["num_processes"], values["process_id"]
        )
    except (ValueError, RuntimeError) as error:
        where = values["coordinator"] or "the cluster's environment"
        raise ValueError(f"the processes of {where} do not come together: {error}") from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if jax.process_index():
        logging.set_verbosity(logging.WARNING)  # process 0 speaks for all


def check_started() -> None:
    """Raises a ValueError where JAX sees several hosts that have not joined each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this is one of {jax.process_count()} hosts of a slice; start the same command on "
            "each with --distributed"
        )


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name} ({_VARIABLES[name]})" for name in names)


def agree(facts: Mapping[str, Any]) -> None:
    """Raises a ValueError on every process, naming each fact (of JSON values) that differs."""
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    every = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    if problem := difference(every):
        raise ValueError(problem)


def difference(facts: Sequence[Mapping[str, Any]]) -> str:
    """A line that names each fact with several values, by process; empty if there is none."""
    parts = []
    for name in dict.fromkeys(name for own in facts for name in own):
        values: dict[str, list[str]] = {}
        for process, own in enumerate(facts):
            values.setdefault(json.dumps(own.get(name)), []).append(str(process))
        if len(values) > 1:
            listed = (f"{value} on process {', '.join(at)}" for value, at in values.items())
            parts.append(f"{name} is {', '.join(listed)}")
    if not parts:
        return ""
    return (
        f"the processes are not those of one run: {'; '.join(parts)}; give every host the same "
        "package, command and data, and start all processes again"
    )


def first_decides(decide: Callable[[], int | None]) -> int | None:
    """What `decide` returns on process 0, where alone it is called: a number from 0, or None.

    If it raises there, the other processes raise a ValueError.
    """
    if jax.process_count() == 1:
        return decide()
    value, failure = _NONE, None
    if not jax.process_index():
        try:
            decided = decide()
            value = _NONE if decided is None else decided
        except Exception as error:
            value, failure = _FAILED, error
    value = int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    if failure:
        raise failure
    if value == _FAILED:
        raise ValueError("process 0 failed; look at what it prints")
    return None if value == _NONE else value


class ShutdownHandler:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.signals: list[int] = []  # those caught here; with several processes always empty

    def stops_after(self, step: int) -> bool:
        """Whether to stop after this step; the answer is the same on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.signals)


@contextlib.contextmanager
def shutdown_handler() -> Iterator[ShutdownHandler]:
    """Makes SIGTERM and SIGINT ask for a stop instead of killing; a second one is obeyed at once.

    With several processes JAX itself waits for SIGTERM, on any of them, and finds a step after
    which all can stop; SIGINT kills.
    """
    handler = ShutdownHandler()
    old: dict[int, Any] = {}

    def catch(number: int, _: Any) -> None:
        handler.signals.append(number)
        signal.signal(number, old[number])

    if jax.process_count() == 1:
        with contextlib.suppress(ValueError):  # not the main thread, as in some notebooks
            for number in (signal.SIGTERM, signal.SIGINT):
                old[number] = signal.signal(number, catch)
    try:
        yield handler
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
