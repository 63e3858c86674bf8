"""Several processes: how they meet and agree; their curves and stops are in test_curves.py."""

import argparse
import json
import shutil

import pytest
from conftest import with_fields
from processes import Host, addresses, start_hosts, start_processes, wait_for
from runs import config_of

from zephyr_jax import distributed
from zephyr_jax.config.run import MeshConfig
from zephyr_jax.distributed import folder_digest
from zephyr_jax.storage import seal
from zephyr_jax.training.setup import pack
from zephyr_jax.training.workdir import run_facts

MEETING = """
import argparse, sys
import jax
from zephyr_jax import distributed

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.start(parser.parse_args(sys.argv[2:]))
me, case = jax.process_index(), sys.argv[1]

def decide():
    if case == "fails":
        raise FileNotFoundError("no checkpoint here")
    return 7

try:
    decided = distributed.first_decides(decide)
    distributed.agree({"decided": decided})
    print("agreed", [me, jax.process_count(), jax.device_count(), decided])
except (ValueError, OSError) as error:
    print(f"error: {error}")
    raise SystemExit(2)
"""


def met(case, environments, tmp_path):
    """Exit statuses of two processes, and the last line of each."""
    (tmp_path / "meeting.py").write_text(MEETING)
    words = [str(tmp_path / "meeting.py"), case]
    started = start_hosts([Host(words, own) for own in environments], 2, tmp_path / "logs")
    statuses = [process.wait(60) for process in started]
    logs = [(tmp_path / "logs" / f"{i}.log").read_text() for i in (0, 1)]
    lines = [[x for x in log.splitlines() if x.startswith(("error", "agreed"))] for log in logs]
    return statuses, [own[-1] if own else "" for own in lines]


@pytest.mark.slow
def test_two_processes_meet_as_their_environment_says(tmp_path):
    wanted = [f"agreed [{i}, 2, 4, 7]" for i in (0, 1)]
    assert met("same", addresses(2), tmp_path) == ([0, 0], wanted)


@pytest.mark.slow
def test_no_process_waits_for_a_decision_that_failed(tmp_path):
    lines = ["error: no checkpoint here", "error: process 0 failed; look at what it prints"]
    assert met("fails", addresses(2), tmp_path) == ([2, 2], lines)


def test_one_process_alone_agrees():
    distributed.start(argparse.Namespace(distributed=False))
    distributed.check_started()
    distributed.agree({"a": 1})
    assert distributed.first_decides(lambda: 3) == 3


@pytest.mark.parametrize("value", ["2", "one"])
def test_incomplete_processes_are_named(monkeypatch, value):
    monkeypatch.setenv("JAX_NUM_PROCESSES", value)
    with pytest.raises(ValueError, match=r"do not come together: .*; name them by JAX_COORDIN"):
        distributed.start(argparse.Namespace(distributed=False))


def test_each_value_is_named_with_its_processes():
    same = [{"a": 1, "b": None}] * 3
    assert not distributed.difference(same)
    line = distributed.difference([*same, {"a": 1, "b": "x"}])
    assert 'b is null on process 0, 1, 2, "x" on process 3' in line


def test_facts_change_with_what_they_are_about(world, tmp_path):
    config = config_of(world, "sft")
    packed = pack(config)
    facts = run_facts(config.to_dict(), packed, tmp_path)
    json.dumps(facts)
    changed = run_facts(with_fields(config, train={"log_every": 7}).to_dict(), packed, tmp_path)
    assert {name for name in facts if facts[name] != changed[name]} == {"config.train.log_every"}
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.py").write_text("{}")
    (model / "config.json").write_text("{}")
    digests = [folder_digest(model), folder_digest(model, "*.py")]
    (model / "config.json").write_text("[]")
    digests.append(folder_digest(model))
    assert len(set(digests)) == 3
    assert folder_digest(model, "*.py") == digests[1]
    own = with_fields(config, init=str(model)).to_dict()
    assert run_facts(own, packed, tmp_path)["initial model"] == digests[2]


def config_file(path, config):
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return path


def train(config, workdir, n, devices, logs):
    path = config_file(workdir.with_suffix(".py"), config)
    words = ["-m", "zephyr_jax", "train", f"--config={path}", f"--workdir={workdir}"]
    return start_processes(words, n, devices, logs)


@pytest.mark.slow
def test_a_run_of_unequal_processes_writes_nothing(world, tmp_path):
    config = config_of(world, "sft", max_steps=2, micro_batches=1)
    config = with_fields(config, mesh=MeshConfig(1, 2, 1))
    packed = pack(config)
    config = with_fields(config, data={"data_dir": "data"})
    logs, workdir, hosts = tmp_path / "logs", tmp_path / "run", []
    for i, own in enumerate(addresses(2)):  # with disks of their own
        home = tmp_path / str(i)
        shutil.copytree(world / "data", home / "data")
        path = config_file(home / "config.py", with_fields(config, train={"log_every": 3 + i}))
        words = ["-m", "zephyr_jax", "train", f"--config={path}", f"--workdir={workdir}"]
        hosts.append(Host(words, own, home))
    path = tmp_path / "1" / "data" / "packed" / packed.folder.name / "manifest.json"
    path.write_text(path.read_text().replace('"padding_share": 0', '"padding_share": 1', 1))
    seal(path.parent)
    assert wait_for(start_hosts(hosts, 1, logs), logs) == [2, 2]
    texts = [(logs / f"{i}.log").read_text().splitlines() for i in (0, 1)]
    errors = [[line for line in lines if line.startswith("error:")] for lines in texts]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1
    assert "config.train.log_every is 3 on process 0, 4 on process 1" in errors[0][0]
    assert f"packed set {packed.folder.name} is" in errors[0][0]
    assert not workdir.exists()
