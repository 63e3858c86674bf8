"""Trackers get each line once, also over a stop, and their own readers find it."""

import json
import struct

import pytest
from conftest import with_fields
from etils import epath

from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation import trackers
from zephyr_jax.evaluation.metrics_file import MetricsFile
from zephyr_jax.evaluation.trackers import check_trackers, open_trackers

STEPS = [(0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train")]


def values_of(step, split):
    prefix = "eval_" if split == "eval" else ""
    return {f"{prefix}loss": step + 0.5, f"{prefix}rewards/chosen": -1.0 * step}


def write(folder, config, resume, lines):
    """What one start of a run does with its metrics."""
    workdir = epath.Path(folder)
    opened = open_trackers(config.train.trackers, config.to_dict(), workdir, resume)
    metrics = MetricsFile(workdir / "metrics.jsonl", resume, opened)
    for step, split in lines:
        metrics.write(step, split, values_of(step, split))
    metrics.close()


def two_starts(folder, *names):
    """Three steps, a stop, and on from step 1: steps 2 and 3 are repeated, 4 is new."""
    config = with_fields(load_config("demo_sft"), train={"trackers": names})
    write(folder, config, 0, STEPS)
    write(folder, config, 1, [*STEPS[2:], (4, "train")])


EXPECTED = [
    *(("eval/loss", step, step + 0.5) for step in (0, 2)),
    *(("train/loss", step, step + 0.5) for step in (1, 2, 3, 4)),
]


def test_tensorboard_hides_repeated_points(tmp_path):
    """TensorBoard's rule: a session that says it starts at a step hides older points from it on."""
    pytest.importorskip("tensorboardX", reason="needs the extra trackers: tensorboardX")
    two_starts(tmp_path, "tensorboard")
    points, text = {}, ""
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in events(path):
            if event.HasField("session_log"):
                points = {key: value for key, value in points.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("tensor"):
                    text = value.tensor.string_val[0].decode()
                else:
                    points.setdefault((value.tag, event.step), []).append(value.simple_value)
    losses = [(*key, *values) for key, values in points.items() if key[0].endswith("/loss")]
    assert sorted(losses) == EXPECTED
    assert '"peak_lr": 0.002' in text


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
    monkeypatch.setattr(trackers, "import_module", lambda _: session)
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
def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra trackers: wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_starts(tmp_path, "wandb")
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.stem for path in files] == [f"run-{run_id}"] * 2
    assert all(b"train/loss" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where trackio is imported
    trackio = pytest.importorskip("trackio", reason="needs the extra trackers: trackio")
    two_starts(tmp_path, "trackio")
    (run,) = trackio.Api().runs("zephyr_jax")
    assert run.name == f"demo_sft-{json.loads((tmp_path / 'trackers.json').read_text())['id']}"
    assert run.config["optim"]["peak_lr"] == 0.002


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb.*\[trackers\]") as error:
        check_trackers(("wandb",), epath.Path(tmp_path))
    assert "\n" not in str(error.value)
    check_trackers((), epath.Path(tmp_path))


def test_tensorboard_needs_a_disk(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="not to gs://bucket/run"):
        check_trackers(("tensorboard",), epath.Path("gs://bucket/run"))


def test_only_process_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.jax, "process_index", lambda: 1)
    assert open_trackers(("wandb",), {}, epath.Path(tmp_path), 0) == []
    assert not list(tmp_path.iterdir())
