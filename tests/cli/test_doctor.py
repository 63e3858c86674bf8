"""`doctor`: its report on a machine, and its exit status."""

from importlib import metadata

import jax
import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.cli import doctor


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_STEPS", 2)
        patch.setattr(doctor, "_TOKENS", 64)
        return doctor.examine()


def test_this_machine_is_fit(report):
    assert not report["problems"]
    assert report["backend"] == "cpu"
    assert report["devices"] == f"{jax.device_count()} x cpu"
    assert report["attention"] == "tiled"
    assert 0 < report["seconds of a step"] < report["seconds to compile a step"]
    assert any("only a CPU" in note for note in report["notes"])
    for name in ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"):
        assert report["versions"][name] == metadata.version(name)


def test_the_text_has_every_fact_and_the_status_is_that_of_the_problems(
    report, monkeypatch, capsys
):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    main(["doctor"])
    out = capsys.readouterr().out
    assert out.endswith("runs will work here\n")
    for part in ("jaxlib", "cores", "attention", "seconds of a step", "note: only a"):
        assert part in out
    monkeypatch.setattr(doctor, "examine", lambda: report | {"problems": ["jax is 9"]})
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert capsys.readouterr().out.endswith("problem: jax is 9\nruns will not work here\n")


@pytest.mark.parametrize(
    ("name", "version"),
    [("jax", "0.9.0"), ("optax", None), ("libtpu", "0.0.99"), ("jaxlib", "0.9.0")],
)
def test_a_version_that_does_not_fit_is_a_problem(name, version, monkeypatch):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda x: version if x == name else installed(x))
    problems = list(doctor._misfits())
    assert problems
    for problem in problems:
        assert problem.startswith(f"{name} is {version or 'not installed'}, required by ")


@pytest.mark.parametrize(("home", "name"), [(jax, "local_devices"), (doctor, "step_times")])
def test_a_broken_driver_is_a_problem_and_not_a_traceback(home, name, monkeypatch):
    def broken(*_):
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(home, name, broken)
    result = doctor.examine()
    assert "Unable to initialize backend 'tpu'" in result["problems"][0]
    assert "runs will not work here" in doctor.show(result)
