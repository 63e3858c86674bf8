"""Runs a command in a process of its own and strikes it in the middle, for tests of faults."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from zephyr_jax.__main__ import main
from zephyr_jax.cli import train
from zephyr_jax.config.run import RunConfig

_CONTEXT = multiprocessing.get_context("forkserver")  # children find everything imported
_CONTEXT.set_forkserver_preload(["zephyr_jax.__main__", "zephyr_jax.reports.fit"])


class Ended(NamedTuple):
    """How a command ended; the step at which it was struck."""

    status: Any
    text: str
    step: int = 0


def _arm(sent: Connection, call: str, n: int, number: int) -> None:
    """Lets the n-th call be struck: by a signal, or by a disk on which no file may grow (0)."""
    module, _, path = call.partition(":")
    *names, name = path.split(".")
    owner = functools.reduce(getattr, names, importlib.import_module(f"zephyr_jax.{module}"))
    whole, calls = getattr(owner, name), itertools.count(1)

    def struck(*args: Any, **options: Any) -> Any:
        if next(calls) == n:
            sent.send(next((x for x in args if isinstance(x, int)), 0))
            if number:
                os.kill(os.getpid(), number)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return whole(*args, **options)

    setattr(owner, name, struck)


def _child(sent: Connection, words: Sequence[str], config: RunConfig, fault: Any) -> None:
    """Runs a command in a process of one device, and sends how it ended."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(x for x in flags if "device_count" not in x)
    errors = sys.stderr = io.StringIO()
    train.load_config = lambda *_: config
    status: Any = 0
    try:
        if fault:
            _arm(sent, *fault)
        main(words)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        status = traceback.format_exc()
    sent.send(Ended(status, errors.getvalue()))


def run(words: Sequence[str], config: RunConfig, *fault: Any) -> Ended:
    """The command, with this config if it trains, until it ended.

    `fault` is the call at which it is struck (MODULE:NAME), which of these calls, and a signal; 0
    stands for a full disk: from then on no file may become longer than 100 bytes.
    """
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_child, args=(theirs, words, config, fault))
    process.start()
    theirs.close()
    received: list[Any] = [0]
    with contextlib.suppress(EOFError):
        while True:
            received.append(ours.recv())
    process.join()
    ended = received.pop() if process.exitcode == 0 else Ended(process.exitcode, "")
    return ended._replace(step=received[-1])
