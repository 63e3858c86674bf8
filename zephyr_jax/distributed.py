"""Several processes of one run, one for each host: how they meet, agree, stop, and are watched.

Every process runs the same command. In a cluster that JAX knows `--distributed` finds the others;
elsewhere three environment variables name them.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import hashlib
import json
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.storage import files_below, is_remote, write_atomic, write_checked

STOPPED = 75  # exit status of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h
PEER_LOST = 76  # exit status of a process of which another one died: EX_PROTOCOL
_SILENT = 20.0  # seconds without a word from another process after which it is dead
_GRACE = 5.0  # seconds in which a process whose peer ended may end by itself, as for the same error
_CONNECT = 10.0  # seconds in which processes find each other for that
# address of process 0 (HOST:PORT), number of processes, and number of this one, from 0
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_BEAT = 30.0  # seconds between two writes of heartbeat.json, at least
TRACED = "train_step"  # what steps are called in a trace
_SMALL = 1 << 20  # bytes of a file whose content counts in `folder_digest`, not its size alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --distributed."""
    cluster = "several hosts, found by the cluster's environment (TPU, Slurm, Open MPI, Kubernetes)"
    parser.add_argument("--distributed", action="store_true", help=cluster)


def start(args: argparse.Namespace) -> None:
    """Joins the others that flag or environment name, before JAX is used; else a ValueError."""
    address, number, own = (os.environ.get(name) or None for name in _VARIABLES)
    if not (address or number or own or args.distributed):
        return
    try:
        count, index = (int(text) if text else None for text in (number, own))
        jax.distributed.initialize(address, count, index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes do not come together: {error}; name them by {', '.join(_VARIABLES)}, "
            "or let --distributed find them"
        ) from error
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


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]


def agree(facts: Mapping[str, Any]) -> None:
    """Raises a ValueError on every process, naming each fact (of JSON values) that differs."""
    if jax.process_count() > 1 and (problem := difference(gathered(dict(facts)))):
        raise ValueError(
            f"the processes are not those of one run: {problem}; give every host the same "
            "package, command and data, and start all processes again"
        )


def difference(facts: Sequence[Mapping[str, Any]]) -> str:
    """Each fact with several values, by process; empty if there is none."""
    parts = []
    for name in dict.fromkeys(name for own in facts for name in own):
        values: dict[str, list[str]] = {}
        for process, own in enumerate(facts):
            values.setdefault(json.dumps(own.get(name)), []).append(str(process))
        listed = (f"{value} on process {', '.join(at)}" for value, at in values.items())
        parts += [f"{name} is {', '.join(listed)}"] if len(values) > 1 else []
    return "; ".join(parts)


def folder_digest(folder: str | os.PathLike[str], pattern: str = "*") -> str | None:
    """A digest of a local folder: names and sizes of its files, and contents of the small ones."""
    if is_remote(folder) or not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    for path in files_below(epath.Path(folder)):
        if path.match(pattern):
            size = path.stat().length
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            digest.update(path.read_bytes() if size < _SMALL else b"")
    return digest.hexdigest()[:16]


def first_decides(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on process 0, as JSON; where it raises, all others do so too."""
    if jax.process_count() == 1:
        return decide()
    value, failure = None, None
    if not jax.process_index():
        try:
            value = decide()
        except Exception as error:
            failure = error
    value, failed = gathered((value, failure is not None))[0]
    if failed:
        raise failure or ValueError("process 0 failed; look at what it prints")
    return value


class _Watch:
    """Ends this process soon after another one died, which JAX notices late and ends in a crash.

    Process 0 hears all others and they hear it, a line each second: who lives, is lost, or is done.
    """

    def __init__(self) -> None:
        self._ends, self._lock = list[socket.socket](), threading.Lock()
        server, place, problem = None, None, ""
        if not jax.process_index():
            server = socket.create_server(("", 0), backlog=jax.process_count())
            server.settimeout(_CONNECT)
            place = _own_address(), server.getsockname()[1]
        place = tuple(gathered(place)[0])
        try:
            if server:
                self._ends = [server.accept()[0] for _ in range(1, jax.process_count())]
            else:
                self._ends = [socket.create_connection(place, _CONNECT)]
        except OSError as error:
            problem = str(error)
        if problems := list(filter(None, gathered(problem))):
            late = "so one that dies is noticed late; open TCP ports between hosts"
            logging.warning("process 0 is not reached at %s:%d (%s), %s", *place, problems[0], late)
            return
        # JAX aborts the others when process 0 is gone. The C library's sleep, which takes the
        # signal's number (6) for seconds, lets `_hear` say so first; Python may be ending then.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        threading.Thread(target=self._beat, daemon=True).start()
        for end in self._ends:
            threading.Thread(target=self._hear, args=(end,), daemon=True).start()

    def say(self, word: str, process: object) -> None:
        """Tells all others that a process is `alive`, `lost` or `done`."""
        for end in self._ends:
            with contextlib.suppress(OSError):  # who hears that end notices
                end.sendall(f"{word} {process}\n".encode())

    def _beat(self) -> None:
        while True:
            self.say("alive", jax.process_index())
            time.sleep(1)

    def _hear(self, end: socket.socket) -> None:
        end.settimeout(_SILENT)
        peer, how = "?", "died"
        try:
            for line in end.makefile():
                word, peer = line.split()
                if word == "done":
                    return
                if word == "lost":
                    break
        except TimeoutError:
            how = f"was silent for {_SILENT:.0f} s"
        except OSError:
            pass
        # At once: when process 0 dies, JAX aborts the others as soon as it has printed a stack.
        with self._lock:
            self.say("lost", peer)
            one = f"process {jax.process_index()} of {jax.process_count()}"
            remedy = "start all again, which go on from the newest step"
            sys.stderr.write(f"error: process {peer} {how}, so {one} ends; {remedy}\n")
            sys.stderr.flush()
            os._exit(PEER_LOST)

    def fail(self, status: int) -> None:
        """Makes this process end with its own error, without JAX, which would wait and abort."""
        self._lock.acquire()  # nothing else ends this process now

        def end() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(_GRACE)
            os._exit(status)

        atexit.register(end)


def _own_address() -> str:
    """The address by which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
        return probe.getsockname()[0]
    return "127.0.0.1"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Of several processes: if one dies in the block, the others end with PEER_LOST and say so."""
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) or "Gloo" in str(error):  # another one may be gone
            time.sleep(_SILENT + _GRACE)
        watch.fail(2 if isinstance(error, ValueError | OSError) else 1)
        raise
    except SystemExit:  # all stop here
        watch.say("done", jax.process_index())
        raise
    watch.say("done", jax.process_index())


class ShutdownHandler(contextlib.AbstractContextManager):
    """Makes SIGTERM and SIGINT ask for a stop instead of killing; a second one is obeyed at once.

    With several processes JAX itself finds a step after which all can stop; SIGINT kills.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []  # those caught; with several processes always empty
        self._old: dict[int, Any] = {}

    def __enter__(self) -> ShutdownHandler:
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # not the main thread, as in some notebooks
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: Any) -> None:
        self.signals.append(number)
        if hasattr(self._old[number], "again"):  # of the command line: a second one comes now
            self._old[number].again = True
        signal.signal(number, self._old[number])

    def stops_after(self, step: int) -> bool:
        """Whether to stop after this step; the answer is the same on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.signals)


class Heartbeat:
    """`heartbeat.json` of process 0: how far the run is; it stays as it is if the devices hang."""

    def __init__(self, workdir: epath.Path, total_steps: int, now: Any = time.monotonic):
        self._path, self._total, self._now = workdir / "heartbeat.json", total_steps, now
        self._last = -math.inf

    def beat(self, step: int, doing: str = "train") -> None:
        """Reports a step; `doing` is "train", "eval", or at once "stopped" or "done"."""
        recent = self._now() - self._last < _BEAT
        if jax.process_index() or (recent and doing not in ("stopped", "done")):
            return
        self._last = self._now()
        status = {"step": step, "total_steps": self._total, "doing": doing, "time": time.time()}
        write_checked(self._path, status)


class Profiler:
    """Process 0 traces steps `span[0]` to `span[1] - 1` for XProf, into WORKDIR/profile."""

    def __init__(self, span: tuple[int, ...], workdir: epath.Path):
        self._steps = range(0) if jax.process_index() or not span else range(*span)
        self._folder, self._local = workdir / "profile", ""

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Names one step in the trace, if it is to be traced."""
        if step not in self._steps:
            yield
            return
        if not self._local:
            # XLA writes to local disks only
            self._local = tempfile.mkdtemp() if is_remote(self._folder) else str(self._folder)
            self._steps = range(step, self._steps.stop)
            jax.profiler.start_trace(self._local)
        with jax.profiler.StepTraceAnnotation(TRACED, step_num=step):
            yield

    def after(self, step: int, result: Any, last: bool = False) -> None:
        """Ends the trace after its last step, or the run's (`last`), when `result` is there."""
        if step not in self._steps or not (last or step == self._steps[-1]):
            return
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        if is_remote(self._folder):
            local = epath.Path(self._local)
            for path in files_below(local):
                write_atomic(self._folder / path.relative_to(local), path.read_bytes())
            local.rmtree()
        logging.info("steps %d to %d are traced in %s", self._steps[0], step, self._folder)
        logging.info("show them with: pip install xprof && xprof --logdir=%s", self._folder)
