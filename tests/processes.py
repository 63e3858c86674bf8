"""Several processes of one run on this machine, as the hosts of a slice would be."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


def output_of(words: list, **options) -> str:
    """What a command wrote to stdout; it has to succeed."""
    options |= {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([*map(str, words)], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


class Host(NamedTuple):
    """What one process differs in from the others."""

    words: list[str]  # behind `python`
    environment: dict[str, str]
    folder: Path | None = None  # where it is started


def start_hosts(hosts: list[Host], devices: int, logs: Path) -> list[subprocess.Popen]:
    """A process for each host with `devices` CPU devices; output goes to `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    started, flags = [], os.environ.get("XLA_FLAGS", "")
    for i, host in enumerate(hosts):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        }
        command, own = [sys.executable, *host.words], environment | host.environment
        with (logs / f"{i}.log").open("w") as log:
            started.append(
                subprocess.Popen(command, env=own, cwd=host.folder, stdout=log, stderr=log)
            )
    return started


def addresses(n: int) -> list[dict[str, str]]:
    """The variables by which n processes on this machine find each other."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = f"127.0.0.1:{bound.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)}
    return [common | {"JAX_PROCESS_ID": str(i)} for i in range(n)]


def start_processes(words: list[str], n: int, devices: int, logs: Path) -> list[subprocess.Popen]:
    """`python WORDS` in n processes with `devices` CPU devices each; output goes to `logs`."""
    return start_hosts([Host(words, own) for own in addresses(n)], devices, logs)


def wait_for(started: list[subprocess.Popen], logs: Path, seconds: float = 600) -> list[int]:
    """The exit statuses; if one fails or takes too long, all are killed and their logs printed."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        if any(process.poll() for process in started):
            time.sleep(2)  # the others may stop for the same reason
            break
        time.sleep(0.2)
    late = [process for process in started if process.poll() is None]
    for process in late:
        process.send_signal(signal.SIGKILL)
        process.wait()
    statuses = [process.returncode for process in started]
    if late or any(statuses):
        text = "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in sorted(logs.iterdir()))
        print(f"statuses {statuses}\n{text}")  # noqa: T201 (pytest shows it where the test fails)
    return statuses
