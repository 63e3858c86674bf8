"""Each station of the pipeline is struck by a fault where it hurts, and started again: slow."""

import functools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import with_fields
from feedback_rounds import scripted, words_of, write_prompts
from judge_server import judge_server
from runs import config_of, metrics_of

import zephyr_jax as zj
from zephyr_jax import storage
from zephyr_jax.weights.checkpoint import params_digest, saved_steps

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "dev"))

from struck import run

pytestmark = pytest.mark.slow

FAULTS = {name: getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT")}
FAULTS["disk full"] = 0
RAW = "prepare_data ultrafeedback --source=WORLD/raw/ultrafeedback --data_dir=HERE/new"
TRAIN = "train --config=. --samples=0 --workdir=HERE/run"
SEAL, WRITE = "storage:seal", "evaluation.metrics_file:MetricsFile.write"
# station -> command; what it makes; the call in it, and the how manieth, at which a fault strikes
STATIONS = {
    "prepare": (RAW, "new/*/*/*", SEAL, 1),
    "pack": ("train --config=. --pack_only", "data/packed/sft-*", SEAL, 1),
    "train": (TRAIN, "run", WRITE, 9),
    "save": (TRAIN, "run", "weights.checkpoint:Checkpointer._seal", 2),
    "resume": (TRAIN, "run", WRITE, 2),
    "export": ("port_weights export RUN HERE/hf", "hf", "weights.exports:seal", 1),
    "import": ("port_weights import MODEL HERE/own", "own", SEAL, 1),
    "feedback": ("", "round", "feedback.collect:write_atomic", 1),
}


def made(folder, pattern):
    """What a station made: parameters and losses, or the files that hold no times."""
    (path,) = folder.glob(pattern)
    if pattern in ("run", "own"):
        rows = metrics_of(path, "train") if pattern == "run" else ()
        losses = {row["step"]: row["loss"] for row in rows}
        return params_digest(zj.load_model(path).params), losses
    files = storage.digests(path)
    timed = (".json", ".md", ".sqlite", "")
    return {name: x for name, x in files.items() if Path(name).suffix not in timed}


@pytest.fixture(scope="module")
def line(world, sft_run, hf_folder, tmp_path_factory):
    """A station's words and config in a folder; the folder in which it ran undisturbed."""
    with judge_server(scripted()) as (url, _):

        def begin(name, folder):
            shutil.copytree(world / "data" / "ultrachat", folder / "data" / "ultrachat")
            data = {"data_dir": str(folder / "data")}
            places = {"HERE": folder, "WORLD": world, "RUN": sft_run.workdir, "MODEL": hf_folder}
            words = STATIONS[name][0].split()
            for place, path in places.items():
                words = [word.replace(place, str(path)) for word in words]
            rated = words_of(url, write_prompts(folder, 6), folder / "round")
            return words or rated, with_fields(config_of(world, "sft"), data=data)

        @functools.cache
        def undisturbed(name):
            folder = tmp_path_factory.mktemp(name)
            assert (ended := run(*begin(name, folder))).status == 0, ended
            return folder

        yield begin, undisturbed


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", STATIONS)
def test_a_struck_station_ends_in_one_line_and_goes_on(
    line, tmp_path, record_property, name, fault
):
    _, result, *call = STATIONS[name]
    begin, undisturbed = line
    wanted, command = made(undisturbed(name), result), begin(name, tmp_path)
    if name == "resume":
        assert run(*command, WRITE, 9, signal.SIGKILL).status == -signal.SIGKILL
    ended = run(*command, *call, FAULTS[fault])
    if FAULTS[fault]:
        whole = (0,) if name == "save" else ()  # the last step was being saved
        assert ended.status in (-FAULTS[fault], 75, 130, *whole), ended
    else:
        assert ended.status in (1, 2), ended
        (error,) = (x for x in ended.text.splitlines() if x.startswith("error: "))
        assert str(tmp_path) in error
    assert "Traceback" not in ended.text
    lost = max(0, ended.step - max(saved_steps(tmp_path / "run"), default=0))
    began = time.monotonic()
    again = run(*command)
    seconds = time.monotonic() - began
    assert again.status == 0, again
    assert made(tmp_path, result) == wanted
    assert not [*tmp_path.rglob(storage.UNFINISHED)]
    steps = f", {lost} steps lost" if result == "run" else ""
    outcome = f"status {ended.status}{steps}; the same result after {seconds:.1f} s"
    record_property("cell", [name, fault, outcome])


@pytest.mark.parametrize("name", sorted(STATIONS.keys() - {"pack", "save", "resume"}))
def test_a_second_run_is_refused(line, tmp_path, record_property, name):
    begin, undisturbed = line
    (first,) = undisturbed(name).glob(STATIONS[name][1])
    command = begin(name, tmp_path)
    with storage.lock(tmp_path / first.relative_to(undisturbed(name))):
        ended = run(*command)
    assert ended.status == 2, ended
    assert f"is in use by process {os.getpid()} on" in ended.text.splitlines()[-1]
    assert run(*command).status == 0
    record_property("cell", [name, "second run", "status 2; the first is not disturbed"])
