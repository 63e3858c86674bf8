"""A damaged file of whatever a run wrote is named before anything is taken from it."""

import dataclasses
import random
import re
import shutil
from pathlib import Path

import pytest
from etils import epath
from runs import ONE, mesh_of

import zephyr_jax as zj
from zephyr_jax.chips import record_start
from zephyr_jax.data.prepare import prepare
from zephyr_jax.evaluation.metrics_file import read_lines
from zephyr_jax.reports.page import Page
from zephyr_jax.reports.run import Run
from zephyr_jax.reports.samples import add_samples
from zephyr_jax.storage import write_checked
from zephyr_jax.training.reference import load_reference
from zephyr_jax.training.setup import pack, run_tokenizer
from zephyr_jax.training.workdir import check_unclaimed
from zephyr_jax.weights.checkpoint import check_step
from zephyr_jax.weights.sources import find_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def place(dpo_run, tmp_path_factory):
    """A copy of a run, of its data and of its export, with every file that a run may write."""
    root = epath.Path(tmp_path_factory.mktemp("place"))
    shutil.copytree(dpo_run.config.data.data_dir, root / "data")
    workdir = dpo_run.copied(root / "run")
    own = root / "data/packed" / Run(workdir).meta["packed"]
    for other in {*own.parent.iterdir()} - {own}:
        other.rmtree()  # of other runs, which nothing here reads
    with mesh_of(ONE):
        model = zj.load_model(workdir)
        zj.export_hf(*model[:3], root / "hf")
        (root / "hf" / "README.md").write_text("a card is the user's")
        zj.save_model(model, root / "imported")
    write_checked(workdir / "samples.json", {"reason": "There is none."})
    return root


def packed_set(root: Path, run):
    data = dataclasses.replace(run.config.data, data_dir=str(root / "data"))
    config = dataclasses.replace(run.config, data=data)
    return pack(config, run_tokenizer(data, ""))


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
    "reference": ("data/reference/*/*", read_reference),
    "checkpoint": (
        "run/checkpoints/10/**/*",
        lambda root, _: check_step(root / "run/checkpoints/10"),
    ),
    "run_config.json": (
        "run/run_config.json",
        lambda root, run: check_unclaimed(root / "run", run.config.to_dict()),
    ),
    "run_config.json in a report": ("run/run_config.json", lambda root, _: Run(root / "run")),
    "run_info.json": (
        "run/run_info.json",
        lambda root, _: record_start(root / "run/run_info.json"),
    ),
    "heartbeat.json": ("run/heartbeat.json", lambda root, _: Run(root / "run")),
    "samples.json": ("run/samples.json", lambda root, _: add_samples(Page("a"), root / "run")),
    "metrics.jsonl": ("run/metrics.jsonl", lambda root, _: intact(root / "run" / "metrics.jsonl")),
    "export": ("hf/*", lambda root, _: zj.load_hf(root / "hf")),
    **{
        f"tokenizer in {name}": (
            f"{name}/tokenizer*",
            lambda root, _, x=name: find_tokenizer(root / x),
        )
        for name in ("run", "hf", "imported")
    },
}


def damage(path: Path, fault: str, rng: random.Random) -> None:
    """One byte becomes another, or the end is cut off, or the file is gone."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if fault == "flipped byte":
        content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content[:place] if fault == "truncated file" else content)
    if fault == "deleted file":
        path.unlink()


# What follows where such damage is not refused
UNSEEN = {
    ("reference", "deleted file"): "without digests.json it is computed again",
    ("export", "deleted file"): "without digests.json it is read as one that somebody changed",
    ("metrics.jsonl", "truncated file"): "the lines before the cut are read",
    ("metrics.jsonl", "deleted file"): "a new file",
    ("run_info.json", "deleted file"): "a new file",
    ("heartbeat.json", "deleted file"): "a report without it",
    ("samples.json", "deleted file"): "a report without them",
}
SLOW = [
    pytest.param(fault, n, marks=pytest.mark.slow)
    for fault, n in (("flipped byte", 100), ("truncated file", 100), ("deleted file", 30))
]


@pytest.mark.parametrize(("fault", "n"), [("flipped byte", 3), *SLOW])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named(place, dpo_run, record_property, kind, fault, n):
    pattern, read = KINDS[kind]
    found = Path(place).glob(pattern)
    files = sorted(path for path in found if path.is_file() and path.suffix != ".md")
    rng, kept, missed = random.Random(kind), {path: path.read_bytes() for path in files}, []
    read(place, dpo_run)
    for i in range(n):
        path = files[i % len(files)] if n >= len(files) else rng.choice(files)
        damage(path, fault, rng)
        try:
            message = str(read(place, dpo_run))
        except (ValueError, FileNotFoundError) as error:
            message = f"error: {error}"
        if not re.fullmatch(f"error: .*({re.escape(path.name)}|tokenizer|digests).*", message):
            missed.append((i, path, message))
        for file, content in kept.items():
            file.write_bytes(content)
    assert not missed or (kind, fault) in UNSEEN, missed
    read(place, dpo_run)
    outcome = f"{n - len(missed)} of {n} refused in one line that names the file"
    follows = f"; else: {UNSEEN[kind, fault]}" if missed else ""
    record_property("cell", [kind, fault, outcome + follows])
