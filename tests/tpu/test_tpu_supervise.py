"""A supervised run against recorded stand-ins, and the hosts' own script."""

import itertools
import os
import subprocess
import tarfile
import time

import pytest
from tpu_tools import HOST, NAMED, NEEDS_BASH, ODD, SLICE, TRAIN, tools

pytestmark = [pytest.mark.slow, NEEDS_BASH]
__all__ = ["tools"]


UP = ["create", "pack", "scp", "install", "start"]


@pytest.mark.parametrize(
    ("events", "code", "steps"),
    [
        (["running", "preempt", "running", "exited 0"], 0, [*UP, "delete", *UP]),
        (["running", "exited 1"], 1, [*UP, "log"]),
        # hosts that end badly because another one is being taken away
        (["exited 134 | lost | exited 75", "exited 0"], 0, [*UP, "start"]),
        (["exited 0 | exited 1 | running"], 1, [*UP, "log"]),
        # a process that was killed, or hangs, is missed by the others: all start again
        (["exited 76 | exited 137"] * 2 + ["exited 0"], 0, [*UP, "stop", "start"]),
        (["exited 76 | running"] * 2 + ["exited 0"], 0, [*UP, "stop", "start"]),
        (["exited 76 | exited 1"], 1, [*UP, "log"]),
        (["exited 137 | exited 137"], 137, [*UP, "log"]),
        # one host is done before the others
        (["silent", "exited 0 | running", "exited 0 | exited 0"], 0, UP),
        (["exited 75"], 1, [*UP, "start", "start"]),
    ],
)
def test_a_supervised_run(events, code, steps, tools):
    words = [SLICE, "supervise", *NAMED, "--poll=0", "--grace=0", "--max_restarts=2"]
    done = tools.run(*words, "--", *TRAIN, events=events)
    assert done.returncode == code, done.stderr
    assert tools.steps() == steps
    starts = [words for words in tools.calls() if words[5:] and "host.sh start" in str(words)]
    assert all(words == starts[0] for words in starts)
    if "log" in steps:
        assert "the end of the log" in done.stdout
        assert f"ended with status {code}; sft still exists and costs" in done.stderr
    elif code:
        assert "restarted 2 times (--max_restarts)" in done.stderr
    else:
        assert "the training is done" in done.stderr
        assert "still exists and costs" in done.stderr


@pytest.mark.parametrize(
    ("beats", "events", "steps"),
    [
        # the heartbeat changes at every look
        ([f"step {i}" for i in range(9)], ["running"] * 5 + ["exited 0"], UP),
        # it does not change: killed, lost, started again
        (["step 1"], [*["running"] * 4, "lost", "exited 0"], [*UP, "stop", "start"]),
        (["ERROR: NOT_FOUND"], [*["running"] * 4, "lost", "exited 0"], [*UP, "stop", "start"]),
        # a bucket that does not answer is no hang
        (["ERROR: connection reset"], ["running"] * 5 + ["exited 0"], UP),
    ],
)
def test_supervise_kills_a_training_that_hangs(beats, events, steps, tools):
    words = [SLICE, "supervise", *NAMED, "--poll=1", "--grace=0", "--hung_after=2"]
    done = tools.run(*words, "--", *TRAIN, events=events, beats=beats)
    assert done.returncode == 0, done.stderr
    # on a slow machine a second look comes too late as well
    assert [step for step, _ in itertools.groupby(tools.steps())] == steps
    assert ("has not changed for 2 s" in done.stderr) == ("stop" in steps)
    read = [words for words in tools.calls() if words[1:3] == ["storage", "cat"]]
    assert {words[3] for words in read} == {"gs://b/runs/sft/heartbeat.json"}


def test_losing_one_of_two_slices_replaces_both(tools):
    words = [SLICE, "supervise", *NAMED, "--slices=2", "--poll=0", "--grace=0"]
    events = ["running", "running", "preempt", "exited 0", "exited 0"]
    done = tools.run(*words, "--", *TRAIN, events=events)
    assert done.returncode == 0, done.stderr
    everywhere = ["create", "pack", "scp", "scp", "install", "install", "start", "start"]
    assert tools.steps() == [*everywhere, "delete", *everywhere]
    reached = {words[5] for words in tools.calls() if words[3:5] == ["tpu-vm", "ssh"]}
    assert reached == {"sft-0", "sft-1"}


@pytest.mark.parametrize(
    ("request_state", "node", "events", "steps"),
    [
        ("ACTIVE", "READY", ["running", "running", "exited 0"], ["delete"]),
        ("SUSPENDED", "ABSENT", ["exited 0"], ["delete", *UP, "delete"]),
        ("PROVISIONING", "READY", ["exited 0"], [*UP[1:], "delete"]),
    ],
    ids=["resumed", "replaced", "waited for"],
)
def test_supervise_takes_up_a_request_as_it_is(request_state, node, events, steps, tools):
    words = [SLICE, "supervise", *NAMED, "--poll=0", "--grace=0", "--delete_when_done"]
    state = {"request": request_state, "node": node}
    done = tools.run(*words, "--", *TRAIN, events=events, state=state)
    assert done.returncode == 0, done.stderr
    assert tools.steps() == steps


def installed(tools, code):
    """A host's home with a training that prints its arguments and ends with `code`."""
    home = tools.folder / "home"
    (home / "zephyr_jax" / ".venv" / "bin").mkdir(parents=True)
    (home / "zephyr_host.sh").write_text(HOST.read_text())
    python = home / "zephyr_jax" / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "in $PWD" "$@"\nsleep 0.3\nexit {code}\n')
    python.chmod(0o755)
    return home


def until(condition):
    for _ in range(200):
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("this does not come to an end")


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def ended(tools, home):
    def status():
        line = tools.run(home / "zephyr_host.sh", "status", home=home).stdout.split(maxsplit=2)
        return line if line[2] != "running\n" else None

    return until(status)


@pytest.mark.parametrize(
    ("code", "program"), [(0, ["-m", "zephyr_jax", "train"]), (75, ["scripts/train.py"])]
)
def test_a_host_records_the_status_and_the_log(code, program, tools):
    home = installed(tools, code)
    host = home / "zephyr_host.sh"
    if program[0] != "-m":  # a checkout is used where there is one
        (home / "zephyr_jax" / "scripts").mkdir()
        (home / "zephyr_jax" / "scripts" / "train.py").touch()
    assert tools.run(host, "status", home=home).stdout.endswith(" none\n")
    assert tools.run(host, "start", *TRAIN, ODD, home=home).stdout.startswith("started on ")
    assert tools.run(host, "status", home=home).stdout.endswith(" running\n")
    assert "no other was started" in tools.run(host, "start", *TRAIN, home=home).stdout
    assert ended(tools, home) == ["zephyr-host", os.uname().nodename, f"exited {code}\n"]
    lines = tools.run(host, "log", "99", home=home).stdout.splitlines()
    assert lines[2:-1] == [f"in {home}/zephyr_jax", *program, *TRAIN, ODD]
    assert lines[-1].endswith(f"ended with status {code}")


def test_a_host_kills_a_training_that_ignores_signals(tools):
    home = installed(tools, 0)
    python = home / "zephyr_jax" / ".venv" / "bin" / "python"
    python.write_text("#!/bin/bash\ntrap : TERM\necho $$ >child\nwhile true; do sleep 0.1; done\n")
    host = home / "zephyr_host.sh"
    assert tools.run(host, "stop", home=home).stdout == ""
    tools.run(host, "start", *TRAIN, home=home)
    child = home / "zephyr_jax" / "child"
    until(lambda: child.is_file() and child.read_text())
    assert tools.run(host, "stop", home=home).stdout.startswith("killed on ")
    assert ended(tools, home)[2] == "lost\n"
    until(lambda: not alive(int(child.read_text())))  # nor does it outlive its keeper


def test_a_training_that_is_killed_with_its_keeper_is_lost(tools):
    home = installed(tools, 0)
    (home / "zephyr_run").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (home / "zephyr_run" / "pid").write_text(f"{gone.pid}\n")
    assert ended(tools, home)[2] == "lost\n"


def test_a_host_installs_jax_with_its_libtpu(tools):
    home = tools.folder / "home"
    home.mkdir()
    (home / "setup.cfg").write_text("[metadata]\n")
    with tarfile.open(home / "zephyr_jax-sft.tar.gz", "w:gz") as archive:
        archive.add(home / "setup.cfg", "setup.cfg")
    done = tools.run(HOST, "install", "zephyr_jax-sft.tar.gz", "0.10.2", "3.11", home=home)
    assert done.returncode == 0, done.stderr
    run = home / "zephyr_jax"
    assert (run / "setup.cfg").is_file()
    pip = ["uv", "pip", "install", "--python", f"{run}/.venv/bin/python", "jax[tpu]==0.10.2"]
    assert tools.calls() == [
        ["uv", "venv", "--python", "3.11", f"{run}/.venv"],
        [*pip, "gcsfs", "--editable", str(run)],
    ]
    tools.run(HOST, "copy", "gs://b/models/m", "models/m", home=home)
    words = ["gcloud", "storage", "rsync", "--recursive", "gs://b/models/m", f"{run}/models/m"]
    assert tools.calls()[-1] == words
    assert (run / "models" / "m").is_dir()
