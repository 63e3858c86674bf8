"""One flipped byte in whatever a run wrote is named before anything is taken from the file."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
from etils import epath
from runs import ONE, mesh_of

import zephyr_jax as zj
from zephyr_jax.chips import record_start
from zephyr_jax.data.packing.packed import open_packed
from zephyr_jax.data.prepare import prepare
from zephyr_jax.evaluation.metrics_file import read_lines
from zephyr_jax.reports.page import Page
from zephyr_jax.reports.run import Run
from zephyr_jax.reports.samples import add_samples, write_samples
from zephyr_jax.training.reference import load_reference
from zephyr_jax.training.setup import run_tokenizer
from zephyr_jax.training.workdir import check_unclaimed
from zephyr_jax.weights.checkpoint import check_step
from zephyr_jax.weights.sources import find_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def place(dpo_run, tmp_path_factory):
    """A copy of a run, of its data and of its export, with every file that a run may write."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(dpo_run.config.data.data_dir, root / "data")
    workdir = dpo_run.copied(root / "run")
    with mesh_of(ONE):
        model = zj.load_model(workdir)
        zj.export_hf(*model[:3], root / "hf")
        zj.save_model(model, root / "imported")
    write_samples(dpo_run.config, workdir, 1)
    return root


def packed_set(root: Path, run):
    data = dataclasses.replace(run.config.data, data_dir=str(root / "data"))
    config = dataclasses.replace(run.config, data=data)
    return open_packed(config, run_tokenizer(data, ""))


def read_set(root: Path, _):
    prepare._verify.cache_clear()
    return prepare.read_split(next(root.glob("data/ultrafeedback/*/*")), "train_prefs")[0]


def read_reference(root: Path, run):
    return load_reference(packed_set(root, run), Run(root / "run").meta["reference"])


def intact(path: Path):
    """The lines of metrics.jsonl; damaged ones are named, and cost themselves."""
    rows, damaged = read_lines(path)
    if damaged:
        raise ValueError(f"{path}: line {damaged} is damaged")
    return rows


# kind -> files in `place`, and who reads them
KINDS = {
    "prepared set": ("data/ultrafeedback/*/*/*", read_set),
    "packed set": ("data/packed/dpo-*/*", packed_set),
    "reference": (
        "data/reference/*/*",
        lambda root, run: load_reference(
            packed_set(root, run), Run(root / "run").meta["reference"]
        ),
    ),
    "checkpoint": (
        "run/checkpoints/10/**/*",
        lambda root, _: check_step(epath.Path(root / "run" / "checkpoints" / "10")),
    ),
    "tokenizer of a run": ("run/tokenizer*", lambda root, _: find_tokenizer(root / "run")),
    "run_config.json": (
        "run/run_config.json",
        lambda root, run: check_unclaimed(epath.Path(root / "run"), run.config.to_dict()),
    ),
    "run_config.json in a report": ("run/run_config.json", lambda root, _: Run(root / "run")),
    "run_info.json": (
        "run/run_info.json",
        lambda root, _: record_start(epath.Path(root / "run" / "run_info.json")),
    ),
    "heartbeat.json": ("run/heartbeat.json", lambda root, _: Run(root / "run")),
    "samples.json": ("run/samples.json", lambda root, _: add_samples(Page("a"), root / "run")),
    "metrics.jsonl": ("run/metrics.jsonl", lambda root, _: intact(root / "run" / "metrics.jsonl")),
    "export": ("hf/*", lambda root, _: zj.load_hf(root / "hf")),
    "tokenizer of an export": ("hf/tokenizer*", lambda root, _: find_tokenizer(root / "hf")),
    "tokenizer of an import": (
        "imported/tokenizer*",
        lambda root, _: find_tokenizer(root / "imported"),
    ),
}


@pytest.mark.parametrize("n", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_named(place, dpo_run, kind, n):
    pattern, read = KINDS[kind]
    files = sorted(path for path in place.glob(pattern) if path.is_file() and path.suffix != ".md")
    rng = random.Random(kind)
    read(place, dpo_run)
    for i in range(n):
        path = files[i % len(files)] if n >= len(files) else rng.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|changed|missing|it must be") as stop:
            read(place, dpo_run)
        assert "\n" not in str(stop.value)
        assert path.name in str(stop.value) or "tokenizer" in str(stop.value), path
        path.write_bytes(whole)
    read(place, dpo_run)
