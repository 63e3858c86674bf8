"""`doctor`: what it says of a machine, and its exit status."""

import configparser
import json
from importlib import metadata
from pathlib import Path

import jax
import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.cli import doctor
from zephyr_jax.config.run import ATTENTION

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


@pytest.fixture
def said(report, monkeypatch, capsys):
    """What the command writes of a changed report, and its status."""

    def say(*words, **changes):
        monkeypatch.setattr(doctor, "examine", lambda: report | changes)
        status = 0
        try:
            main(["doctor", *words])
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().out

    return say


def test_this_machine_is_fit(report):
    assert report["ok"], report["problems"]
    assert report["platform"] == "cpu"
    assert report["all_devices"] == len(report["devices"]) == jax.device_count()
    assert set(report["attention"].values()) <= set(ATTENTION)
    assert report["attention"]["float32"] == "tiled"
    assert report["step"]["finite"]
    assert report["step"]["smaller"]
    assert 0 < report["step"]["seconds"] < report["step"]["compile_seconds"]
    assert any("only a CPU" in note for note in report["notes"])


def test_versions_are_those_of_the_package(report):
    for name in ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "grain"):
        assert report["versions"][name]["installed"] == metadata.version(name)
        assert report["versions"][name]["fits"]


def test_short_rows_go_to_einsum():
    assert doctor.attention_kernel(128, 128, "float32") == "einsum"


def test_json_is_the_report(report, said):
    status, out = said("--json")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(report))


def test_text_names_what_matters(report, said):
    status, out = said()
    assert status == 0
    assert out.endswith("runs will work here\n")
    for part in (
        "jaxlib",
        "cores",
        "attention of packed rows",
        "training step",
        "note: only a CPU",
    ):
        assert part in out


def test_a_problem_ends_in_status_1(said):
    status, out = said(ok=False, problems=["jax is 9, wanted is <1; install it anew"])
    assert status == 1
    assert out.endswith("runs will not work here\n")
    assert "problem: jax is 9" in out


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        ({"jax": "0.9.0"}, ["jax is 0.9.0, wanted is"]),
        ({"optax": None}, ["optax is not installed"]),
        ({"libtpu": "0.0.99"}, ["libtpu is 0.0.99, wanted is"]),
        ({"jaxlib": "0.9.0"}, ["jaxlib is 0.9.0, wanted is"]),
        ({}, []),
    ],
)
def test_what_does_not_fit_is_a_problem(found, lines, monkeypatch):
    installed = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: found[name] if name in found else installed(name)
    )
    problems = []
    doctor.versions(problems, [])
    assert len(problems) == len(lines), problems
    for problem, line in zip(problems, lines, strict=True):
        assert problem.startswith(line)


def test_no_devices_is_a_problem_and_not_a_traceback(monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", broken)
    found = doctor.examine()
    assert not found["ok"]
    assert "Unable to initialize backend 'tpu'" in found["problems"][0]
    assert "runs will not work here" in doctor.show(found)


def test_a_step_that_fails_is_a_problem(monkeypatch):
    def broken(dtype):
        raise RuntimeError("cuDNN is not there")

    monkeypatch.setattr(doctor, "step_times", broken)
    found = doctor.examine()
    assert not found["ok"]
    assert "cuDNN is not there" in doctor.show(found)


def test_a_launcher_without_distributed_is_noted(report, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setattr(doctor, "step_times", lambda dtype: report["step"])
    notes = doctor.examine()["notes"]
    assert any("the launcher started 4 processes" in note for note in notes)


def test_slowness_of_a_gpu():
    with_cudnn = doctor._slow("gpu", {"bfloat16": "cudnn", "float32": "tiled"})
    without = doctor._slow("gpu", {"bfloat16": "tiled", "float32": "tiled"})
    assert len(with_cudnn) == 1
    assert any("cuDNN" in note and "slower" in note for note in without)
    assert doctor._slow("tpu", {}) == []


def test_extras_are_those_of_setup_cfg():
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    assert set(doctor.EXTRAS) <= set(extras)
    for name, (distributions, _) in doctor.EXTRAS.items():
        if name != "plan":  # libtpu comes by jax[tpu]
            assert all(one in extras[name] for one in distributions), name
