"""Processes that are not those of one run: one line on each, before anything is written."""

import dataclasses
import json
import shutil

import pytest
from processes import ROOT, Host, addresses, start_hosts, start_processes, wait_for
from runs import config_of
from test_distributed import config_file

from zephyr_jax import distributed
from zephyr_jax.config.run import MeshConfig
from zephyr_jax.training.setup import pack
from zephyr_jax.training.workdir import folder_digest, run_facts

MEETING = """
import argparse, sys
import jax
from zephyr_jax import distributed

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.start(parser.parse_args([]))
me, case = jax.process_index(), sys.argv[1]

def decide():
    if case == "fails":
        raise FileNotFoundError("no checkpoint here")
    return 7

try:
    decided = distributed.first_decides(decide)
    distributed.agree({"one": 1, "two": me if case == "differ" else 2})
    distributed.agree({"longer" * me: 1} if case == "names" else {"again": decided})
    print("agreed on", decided)
except (ValueError, OSError) as error:
    print(f"error: {error}")
    raise SystemExit(2)
"""


def met(case, tmp_path):
    """Exit statuses of two processes, and the last line of each."""
    (tmp_path / "meeting.py").write_text(MEETING)
    started = start_processes([str(tmp_path / "meeting.py"), case], 2, 1, tmp_path / "logs")
    statuses = [process.wait(60) for process in started]
    logs = [(tmp_path / "logs" / f"{i}.log").read_text() for i in (0, 1)]
    lines = [[x for x in log.splitlines() if x.startswith(("error", "agreed"))] for log in logs]
    return statuses, [own[-1] if own else "" for own in lines]


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    assert met("same", tmp_path) == ([0, 0], ["agreed on 7"] * 2)


@pytest.mark.slow
def test_a_difference_is_the_same_line_on_both(tmp_path):
    statuses, lines = met("differ", tmp_path)
    assert statuses == [2, 2]
    assert lines[0] == lines[1]
    assert "two is 0 on process 0, 1 on process 1; give every host the same" in lines[0]
    assert "one is" not in lines[0]


@pytest.mark.slow
def test_no_process_waits_for_a_decision_that_failed(tmp_path):
    statuses, lines = met("fails", tmp_path)
    assert statuses == [2, 2]
    assert lines[0] == "error: no checkpoint here"
    assert lines[1] == "error: process 0 failed; look at what it prints"


def test_one_process_alone_agrees():
    distributed.agree({"a": 1})
    assert distributed.first_decides(lambda: 3) == 3


def test_each_value_is_named_with_its_processes():
    same = [{"a": 1, "b": None}] * 3
    assert not distributed.difference(same)
    line = distributed.difference([*same, {"a": 1, "b": "x"}])
    assert 'b is null on process 0, 1, 2, "x" on process 3' in line


def test_facts_change_with_what_they_are_about(world, tmp_path):
    config = config_of(world, "sft")
    packed = pack(config, 1)
    facts = run_facts(config.to_dict(), packed, tmp_path)
    json.dumps(facts)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=7))
    changed = run_facts(other.to_dict(), packed, tmp_path)
    assert {name for name in facts if facts[name] != changed[name]} == {"config.train.log_every"}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    digests = []
    for text in ("{}", "[]"):
        (model / "config.json").write_text(text)
        own = dataclasses.replace(config, init=str(model))
        digests.append(run_facts(own.to_dict(), packed, tmp_path)["initial model"])
    assert len(set(digests)) == 2


def test_a_comment_changes_the_code_digest(tmp_path):
    shutil.copytree(ROOT / "zephyr_jax", tmp_path / "zephyr_jax")
    digest = folder_digest(tmp_path / "zephyr_jax", "*.py")
    assert digest == folder_digest(ROOT / "zephyr_jax", "*.py")
    with (tmp_path / "zephyr_jax" / "types.py").open("a") as file:
        file.write("# another\n")
    assert digest != folder_digest(tmp_path / "zephyr_jax", "*.py")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["config", "packed set"])
def test_a_run_of_unequal_processes_writes_nothing(world, tmp_path, what):
    config = config_of(world, "sft", max_steps=2, micro_batches=1)
    config = dataclasses.replace(config, mesh=MeshConfig(1, 2, 1))
    packed = pack(config, 2)
    logs, workdir, other = tmp_path / "logs", tmp_path / "run", config
    homes = [tmp_path / "here", tmp_path / "there"]
    for home in homes:  # the same words on both, as hosts with disks of their own have
        home.mkdir()
        (home / "data").symlink_to(world / "data")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir="data"))
    if what == "config":
        other = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=3))
    if what == "packed set":
        (homes[1] / "data").unlink()
        shutil.copytree(world / "data", homes[1] / "data")
        manifest = homes[1] / "data" / "packed" / packed.folder.name / "manifest.json"
        told = json.loads(manifest.read_text())
        told["splits"]["eval"]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(told))
    hosts = []
    for i, own in enumerate(addresses(2)):
        path = config_file(tmp_path / f"{i}.py", other if i and what == "config" else config)
        words = ["-m", "zephyr_jax", "train", f"--config={path}", f"--workdir={workdir}"]
        hosts.append(Host(words, own, homes[i]))
    assert wait_for(start_hosts(hosts, 1, logs), logs) == [2, 2]
    told = [(logs / f"{i}.log").read_text().splitlines() for i in (0, 1)]
    said = [[line for line in lines if line.startswith("error:")] for lines in told]
    assert said[0] == said[1]
    assert len(said[0]) == 1
    named = {
        "config": "config.train.log_every is 1 on process 0, 3 on process 1",
        "packed set": f"packed set {packed.folder.name} is",
    }
    assert named[what] in said[0][0]
    assert said[0][0].count(" on process 0") == 1
    assert not workdir.exists()
