"""A process that dies is named by all others, which end within 30 s for a new start of all."""

import re
import signal
import time

import pytest
from processes import start_processes

from zephyr_jax.distributed import PEER_LOST

WORK = """
import argparse, sys, time
import numpy as np
from jax.experimental import multihost_utils
from zephyr_jax import distributed

def say(watch, word, process, say=distributed._Watch.say):
    time.sleep(2 * (word == "lost"))
    say(watch, word, process)

if sys.argv[2] == "late":  # as on a loaded machine, where JAX's abort comes first
    distributed._Watch.say = say
distributed.start(argparse.Namespace(distributed=False))
with distributed.watched():
    print("watched", flush=True)
    for i in range(10**6):
        if sys.argv[1] == "together":
            multihost_utils.process_allgather(np.int32(i))
        time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["together", "alone"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize(("n", "victim"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_dead_process_is_named_by_all_others(tmp_path, n, victim, number, doing):
    (tmp_path / "work.py").write_text(WORK)
    first_killed = victim == 0 and number == signal.SIGKILL  # then JAX prints a stack, too
    words = [str(tmp_path / "work.py"), doing, "late" if first_killed else ""]
    started = start_processes(words, n, 1, tmp_path / "logs")
    logs = [tmp_path / "logs" / f"{i}.log" for i in range(n)]
    try:
        end = time.monotonic() + 120
        while not all("watched" in log.read_text() for log in logs) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(2)
        started[victim].send_signal(number)
        others = [i for i in range(n) if i != victim]
        killed = time.monotonic()
        statuses = [started[i].wait(40) for i in others]
        assert time.monotonic() - killed < 30
    finally:
        for process in started:
            process.kill()
    assert set(statuses) == {PEER_LOST}, "\n".join(log.read_text() for log in logs)
    for i in others if not first_killed else ():
        lines = logs[i].read_text().partition("watched\n")[2].splitlines()
        lines = [line for line in lines if "[Gloo]" not in line]
        how = "died" if number == signal.SIGKILL else "was silent for 20 s"
        wanted = (
            f"error: process {victim} (died|{how}), so process {i} of {n} ends; start all again.*"
        )
        assert len(lines) == 1, lines
        assert re.fullmatch(wanted, lines[0]), lines
