"""Trackers get each line once, also over a stop, and their own readers find it."""

import dataclasses
import json
import struct
import subprocess
import sys

import pytest
from etils import epath

from zephyr_jax.config.run import load_config
from zephyr_jax.training import trackers
from zephyr_jax.training.metrics import MetricsFile
from zephyr_jax.training.trackers import check_trackers, open_trackers

STEPS = [(0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train")]


def config_with(*names):
    config = load_config("demo_sft")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, trackers=names))


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
    config = config_with(*names)
    write(folder, config, 0, STEPS)
    write(folder, config, 1, [*STEPS[2:], (4, "train")])
    return config


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
    losses = [(*key, *found) for key, found in points.items() if key[0].endswith("/loss")]
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


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra trackers: wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_starts(tmp_path, "wandb")
    ids, losses = set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                found = {}
                for item in record.history.item:
                    found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
                losses += [(k, found["step"], v) for k, v in found.items() if k.endswith("/loss")]
    assert sorted(losses) == EXPECTED
    assert ids == {(json.loads((tmp_path / "trackers.json").read_text())["id"], "demo_sft")}


def wandb_records(path):
    """The records of a .wandb file: a header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("trackio", reason="needs the extra trackers: trackio")
    code = """
import json, os, sys
sys.path[:0] = sys.argv[2:]
os.environ["TRACKIO_DIR"] = sys.argv[1] + "/trackio"  # which trackio reads where it is imported
import test_trackers
test_trackers.two_starts(sys.argv[1], "trackio")
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("zephyr_jax")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("zephyr_jax", run.name)]))
"""
    words = [sys.executable, "-c", code, str(tmp_path), *sys.path]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    name, config, logs = json.loads(done.stdout.splitlines()[-1])
    losses = [(k, row["step"], v) for row in logs for k, v in row.items() if k.endswith("/loss")]
    assert sorted(losses) == EXPECTED
    assert name == f"demo_sft-{json.loads((tmp_path / 'trackers.json').read_text())['id']}"
    assert config["optim"]["peak_lr"] == 0.002


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


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.lines, self.closed = [], False

    def log(self, step, split, values):
        self.lines.append((step, split))

    def close(self):
        self.closed = True


def test_a_tracker_gets_no_line_twice(tmp_path, monkeypatch):
    opened = []

    def opener(*args):
        opened.append((args, Recorder()))
        return opened[-1][1]

    monkeypatch.setitem(trackers._OPEN, "wandb", opener)
    two_starts(tmp_path, "wandb")
    (first, one), (second, two) = opened
    assert first[1] == second[1]  # the run's id
    assert second[3] == 1
    assert one.lines == STEPS
    assert two.lines == [(4, "train")]


def test_only_process_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.jax, "process_index", lambda: 1)
    assert open_trackers(("wandb",), {}, epath.Path(tmp_path), 0) == []
    assert not list(tmp_path.iterdir())
