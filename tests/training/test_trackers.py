"""Trackers get each line once, also over a stop, and their own readers find it."""

import json
from pathlib import Path
from unittest import mock

import pytest
from conftest import with_fields
from etils import epath

from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation import metrics_file
from zephyr_jax.evaluation.metrics_file import MetricsFile, check_trackers, open_trackers

STEPS = [(0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train")]
EXPECTED = [
    *(("eval/loss", step, step + 0.5) for step in (0, 2)),
    *(("train/loss", step, step + 0.5) for step in (1, 2, 3, 4)),
]


def two_starts(folder, *names):
    """Three steps, a stop, and on from step 1: steps 2 and 3 are repeated, 4 is new."""
    config = with_fields(load_config("demo_sft"), train={"trackers": names})
    for resume, lines in ((0, STEPS), (1, [*STEPS[2:], (4, "train")])):
        metrics = MetricsFile(epath.Path(folder) / "metrics.jsonl", resume, config)
        for step, split in lines:
            metrics.write(step, split, {"eval_loss" if split == "eval" else "loss": step + 0.5})
        metrics.close()


def got_by(tracker):
    """(name, step, value) of what a tracker's package was given."""
    scalars = [(c.args[0], c.args[2], c.args[1]) for c in tracker.add_scalar.mock_calls]
    lines = [(c.args[0], c.kwargs.get("step")) for c in tracker.log.mock_calls]
    named = [(k, line.get("step", step), x) for line, step in lines for k, x in line.items()]
    return sorted(scalars + [each for each in named if each[0] != "step"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_run_goes_on_under_one_id_and_gets_no_line_twice(tmp_path, monkeypatch, name):
    tracker = mock.MagicMock(Error=OSError)  # the package, and the run that it starts
    tracker.init.return_value = tracker

    def writer(folder, **_):
        Path(folder).mkdir(exist_ok=True)
        return tracker.init(id=folder)

    tracker.SummaryWriter = writer
    monkeypatch.setattr(metrics_file, "import_module", lambda _: tracker)
    two_starts(tmp_path, name)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    ids = {"tensorboard": str(tmp_path / "tensorboard"), "wandb": run_id}
    field, wanted = ("id", ids[name]) if name in ids else ("name", f"demo_sft-{run_id}")
    starts = [call.kwargs for call in tracker.init.mock_calls]
    assert [options[field] for options in starts] == [wanted, wanted]
    assert got_by(tracker) == EXPECTED
    assert len(tracker.finish.mock_calls + tracker.close.mock_calls) == 2
    if name == "tensorboard":
        assert len(tracker.add_text.mock_calls) == 1
    else:
        assert {options["resume"] for options in starts} == {"allow"}
        assert starts[0]["config"]["optim"]["peak_lr"] == 0.002
    if name == "wandb":
        tracker.define_metric.assert_called_with("*", step_metric="step")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_the_packages_own_run_goes_on(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where trackio is imported
    package = pytest.importorskip(metrics_file._PACKAGES[name], reason="needs the extra trackers")
    two_starts(tmp_path, name)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    if name == "wandb":
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        assert [path.stem for path in files] == [f"run-{run_id}"] * 2
    elif name == "tensorboard":
        assert len(list(tmp_path.glob("tensorboard/events.out.*"))) == 2
    else:
        assert [run.name for run in package.Api().runs("zephyr_jax")] == [f"demo_sft-{run_id}"]


def test_a_tracker_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb.*\[trackers\]") as error:
        check_trackers(("wandb",), epath.Path(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(metrics_file, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="not gs://bucket/run"):
        check_trackers(("tensorboard",), epath.Path("gs://bucket/run"))


def test_only_process_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file.jax, "process_index", lambda: 1)
    config = with_fields(load_config("demo_sft"), train={"trackers": ("wandb",)})
    assert open_trackers(config, epath.Path(tmp_path)) == []
    assert not list(tmp_path.iterdir())
