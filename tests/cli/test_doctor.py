"""`doctor`: its report on a machine, and its exit status."""

import configparser
import json
from importlib import metadata
from pathlib import Path

import jax
import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.cli import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_STEPS", 2)
        patch.setattr(doctor, "_TOKENS", 64)
        return doctor.examine()


def test_this_machine_is_fit(report):
    assert report["ok"], report["problems"]
    assert report["platform"] == "cpu"
    assert report["all_devices"] == len(report["devices"]) == jax.device_count()
    assert report["attention"] == "tiled"
    assert 0 < report["step"]["seconds"] < report["step"]["compile_seconds"]
    assert any("only a CPU" in note for note in report["notes"])
    for name in ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "grain"):
        assert report["versions"][name]["installed"] == metadata.version(name)


def test_the_text_and_the_json_are_the_report(report, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))
    main(["doctor"])
    out = capsys.readouterr().out
    assert out.endswith("runs will work here\n")
    for part in ("jaxlib", "cores", "attention of packed rows", "training step", "note: only a"):
        assert part in out
    problem = {"ok": False, "problems": ["jax is 9, required is <1"]}
    monkeypatch.setattr(doctor, "examine", lambda: report | problem)
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    end = "problem: jax is 9, required is <1\nruns will not work here\n"
    assert capsys.readouterr().out.endswith(end)


@pytest.mark.parametrize(
    ("name", "version"),
    [("jax", "0.9.0"), ("optax", None), ("libtpu", "0.0.99"), ("jaxlib", "0.9.0")],
)
def test_a_version_that_does_not_fit_is_a_problem(name, version, monkeypatch):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda x: version if x == name else installed(x))
    monkeypatch.setattr(doctor, "_accelerators", lambda *_: {})
    (problem,) = doctor.examine()["problems"]
    assert problem.startswith(f"{name} is {version or 'not installed'}, required is")


@pytest.mark.parametrize(("home", "name"), [(jax, "devices"), (doctor, "step_times")])
def test_a_broken_driver_is_a_problem_and_not_a_traceback(home, name, monkeypatch):
    def broken(*_):
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(home, name, broken)
    result = doctor.examine()
    assert "Unable to initialize backend 'tpu'" in result["problems"][0]
    assert "runs will not work here" in doctor.show(result)


def test_extras_are_those_of_setup_cfg():
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    assert set(doctor.EXTRAS) <= set(extras)
    for name, (distributions, _) in doctor.EXTRAS.items():
        if name != "plan":  # libtpu comes by jax[tpu]
            assert all(one in extras[name] for one in distributions), name


def test_a_launcher_without_distributed_is_noted(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    times = {"seconds": 1.0, "tokens_per_s": 1, "loss": 1.0}
    monkeypatch.setattr(doctor, "step_times", lambda _: times)
    assert any("the launcher started 4 processes" in note for note in doctor.examine()["notes"])
