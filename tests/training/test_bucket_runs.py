"""A run whose workdir is behind a URL: a folder plays the bucket, and a small server speaks GCS."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from buckets import stand_in
from etils import epath
from gcs_server import serve
from orbax.checkpoint._src.path import gcs_utils
from runs import ONE, TIMED, Killed, config_of, kill_at, mesh_of

import zephyr_jax as zj
from zephyr_jax.storage import files_below, write_atomic
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checkpoint import Checkpointer
from zephyr_jax.weights.checksums import saved_steps
from zephyr_jax.weights.sources import load_adapters, resolve


class Bucket(NamedTuple):
    """A run in the bucket: its URL, which no other test has, and where it really is."""

    url: str
    run: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One folder and one server for all tests: TensorStore keeps the connection that it has."""
    folder = tmp_path_factory.mktemp("bucket")
    server, address = serve(folder)
    yield folder, address
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(monkeypatch, tmp_path, served):
    folder, address = served
    stand_in(monkeypatch, folder)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    # Orbax asks Google's own package, before it deletes, what kind of bucket it is
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)
    name = tmp_path.name
    with mesh_of(ONE):
        yield Bucket(f"gs://bucket/{name}/run", folder / name / "run")


def rows_of(workdir):
    return [
        {name: value for name, value in row.items() if name not in TIMED}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_in_a_bucket_is_the_run_on_a_disk(world, bucket, tmp_path, monkeypatch, kind):
    config = config_of(world, kind, log_every=1, eval_every=5, checkpoint_every=2)
    whole = zj.fit(config, tmp_path / "disk")
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            zj.fit(config, bucket.url)
    # a step that was being written when the run was killed has no commit file, and is none
    assert max(saved_steps(epath.Path(bucket.url))) in (4, 6)
    (bucket.run / "checkpoints" / "8" / "params").mkdir(parents=True)
    assert 8 not in saved_steps(epath.Path(bucket.url))
    equal(zj.fit(config, bucket.url), whole)
    assert rows_of(epath.Path(bucket.url)) == rows_of(tmp_path / "disk")
    here = bucket.run
    names = {path.name for path in here.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "run_config.json", "heartbeat.json"} <= names
    saved = json.loads((here / "run_config.json").read_text())
    assert zj.RunConfig.from_config_dict(saved) == config
    tables = sorted(path.name for path in here.glob("evaluations/*.npz"))
    assert tables == (["000000.npz", "000005.npz", "000010.npz"] if kind == "dpo" else [])
    assert saved_steps(epath.Path(bucket.url)) == [8, 10]
    # what a run left there is a model
    for source in (bucket.url, f"{bucket.url}/checkpoints/10"):
        model = zj.load_model(source)
        equal(model.params, whole.params)
        assert model.lineage["step"] == 10
    assert not list((tmp_path).rglob("gs:*"))


@pytest.mark.slow
def test_damage_in_a_bucket_is_found_and_put_aside(world, bucket):
    config = config_of(world, "sft")
    whole = zj.fit(config, bucket.url)
    folder = bucket.run / "checkpoints" / "10" / "params"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert zj.load_model(bucket.url).lineage["step"] == 5
    equal(zj.fit(config, bucket.url), whole)
    assert (bucket.run / "damaged" / "10").is_dir()


def test_a_bucket_without_a_run_is_no_model(bucket):
    with pytest.raises(FileNotFoundError, match="holds no checkpoints of a run; other models"):
        resolve("gs://bucket/nothing")
    with pytest.raises(FileNotFoundError, match="is no workdir"):
        load_adapters("gs://bucket/nothing")
    assert Checkpointer("gs://bucket/nothing", 2).restore(None) is None


def test_files_are_written_whole_and_found_again(bucket, tmp_path):
    for root in (epath.Path(f"{bucket.url}/a"), epath.Path(tmp_path / "a")):
        for name in ("x.json", "deep/y.txt", "deep/er/z.npz"):
            write_atomic(root / name, name.encode())
            write_atomic(root / name, name)
        found = [str(path.relative_to(root)) for path in files_below(root)]
        assert found == ["deep/er/z.npz", "deep/y.txt", "x.json"]
        assert (root / "deep/y.txt").read_text() == "deep/y.txt"
        assert files_below(root / "none") == []
    assert sorted(path.name for path in (bucket.run / "a").iterdir()) == ["deep", "x.json"]


def test_metrics_in_a_bucket_are_written_whole(bucket):
    from zephyr_jax.training.metrics import MetricsFile

    path = epath.Path(bucket.url) / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    metrics.write(1, "train", {"loss": 1.0})
    metrics.write(2, "train", {"loss": 0.5})
    assert read_metrics(path) == []
    metrics.flush()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    again = MetricsFile(path, 1)
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert again.has(1, "train")


@pytest.mark.slow
def test_adapters_in_a_bucket(world, bucket, tmp_path):
    config = config_of(world, "sft", max_steps=1, eval_every=0)
    zj.fit(config, f"{bucket.url}_base")
    lora = zj.config.LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q", "v"))
    tuned = dataclasses.replace(config, init=f"{bucket.url}_base", lora=lora)
    zj.fit(tuned, bucket.url)
    assert load_adapters(bucket.url).lora == lora
    assert zj.load_model(bucket.url).lineage["step"] == 1
