"""Trackers get each line once, also over a stop, and their own readers find it."""

import json
import struct

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


def test_tensorboard_has_every_point_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra trackers: tensorboardX")
    two_starts(tmp_path, "tensorboard")
    points, text = [], ""
    for event in (e for path in (tmp_path / "tensorboard").iterdir() for e in events(path)):
        for value in event.summary.value:
            if value.HasField("tensor"):
                text += value.tensor.string_val[0].decode()
            else:
                points.append((value.tag, event.step, value.simple_value))
    assert sorted(points) == EXPECTED
    assert text.count('"peak_lr": 0.002') == 1


def events(path):
    """The events of a TensorBoard file: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


class Session:
    """A run of W&B or trackio, and the package that starts it, which remember what they get."""

    Settings, Error = dict, OSError

    def __init__(self):
        self.started, self.lines, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, **options):
        assert (name, options) in (("step", {}), ("*", {"step_metric": "step"}))

    def log(self, values, step=None):
        self.lines.append({"step": step} | values)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_goes_on_under_one_id_and_gets_no_line_twice(tmp_path, monkeypatch, name):
    session = Session()
    monkeypatch.setattr(metrics_file, "import_module", lambda _: session)
    two_starts(tmp_path, name)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    field, wanted = ("id", run_id) if name == "wandb" else ("name", f"demo_sft-{run_id}")
    assert [options[field] for options in session.started] == [wanted, wanted]
    assert {options["resume"] for options in session.started} == {"allow"}
    assert session.started[0]["config"]["optim"]["peak_lr"] == 0.002
    losses = [(k, row["step"], v) for row in session.lines for k, v in row.items() if "/loss" in k]
    assert sorted(losses) == EXPECTED
    assert session.finished == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_packages_own_run_goes_on(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where trackio is imported
    package = pytest.importorskip(name, reason=f"needs the extra trackers: {name}")
    two_starts(tmp_path, name)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    if name == "wandb":
        files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        assert [path.stem for path in files] == [f"run-{run_id}"] * 2
    else:
        assert [run.name for run in package.Api().runs("zephyr_jax")] == [f"demo_sft-{run_id}"]


def test_a_tracker_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb.*\[trackers\]") as error:
        check_trackers(("wandb",), epath.Path(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(metrics_file, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="not to gs://bucket/run"):
        check_trackers(("tensorboard",), epath.Path("gs://bucket/run"))


def test_only_process_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file.jax, "process_index", lambda: 1)
    config = with_fields(load_config("demo_sft"), train={"trackers": ("wandb",)})
    assert open_trackers(config, epath.Path(tmp_path)) == []
    assert not list(tmp_path.iterdir())
