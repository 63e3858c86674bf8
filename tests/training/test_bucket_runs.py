"""A run whose workdir is behind a URL: a folder plays the bucket, and a small server speaks GCS."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import runs
from buckets import serve, stand_in
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from runs import ONE, TIMED, config_of, metrics_of

import zephyr_jax as zj
from zephyr_jax.config.run import LoraConfig
from zephyr_jax.evaluation.metrics_file import MetricsFile, read_metrics
from zephyr_jax.storage import files_below, write_atomic
from zephyr_jax.training.loop import fit
from zephyr_jax.weights.checkpoint import Checkpointer, saved_steps
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
    with runs.mesh_of(ONE):
        yield Bucket(f"gs://bucket/{name}/run", folder / name / "run")


def rows_of(workdir):
    return [{name: row[name] for name in row.keys() - TIMED} for row in metrics_of(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_in_a_bucket_is_the_run_on_a_disk(world, bucket, tmp_path, monkeypatch, kind):
    config = config_of(world, kind, log_every=1, eval_every=5, checkpoint_every=2)
    url, here = epath.Path(bucket.url), bucket.run
    whole = fit(config, tmp_path / "disk")
    runs.assert_equal(runs.killed_and_resumed(monkeypatch, config, bucket.url, 7), whole)
    assert rows_of(url) == rows_of(tmp_path / "disk")
    names = {path.name for path in here.iterdir()}
    assert {"checkpoints", "metrics.jsonl", "run_config.json", "heartbeat.json"} <= names
    saved = json.loads((here / "run_config.json").read_text())
    assert zj.RunConfig.from_config_dict(saved) == config
    tables = sorted(path.name for path in here.glob("evaluations/*.npz"))
    assert tables == (["000000.npz", "000005.npz", "000010.npz"] if kind == "dpo" else [])
    # a step that was being written when a run was killed has no commit file, and is none
    (here / "checkpoints" / "12" / "params").mkdir(parents=True)
    assert saved_steps(url) == [8, 10]
    # what a run left there is a model
    for source in (bucket.url, f"{bucket.url}/checkpoints/10"):
        model = zj.load_model(source)
        runs.assert_equal(model.params, whole.params)
        assert model.lineage["step"] == 10
    assert not list((tmp_path).rglob("gs:*"))
    # damage is found, and put aside
    runs.flip_a_bit(here / "checkpoints" / "10" / "params")
    assert zj.load_model(bucket.url).lineage["step"] == 8
    runs.assert_equal(fit(config, bucket.url), whole)
    assert (here / "damaged" / "10").is_dir()


def test_a_bucket_without_a_run_is_no_model(bucket):
    with pytest.raises(FileNotFoundError, match="holds no checkpoints of a run; other models"):
        resolve("gs://bucket/nothing")
    with pytest.raises(ValueError, match="holds no adapters of a run; only a workdir"):
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
    fit(config, f"{bucket.url}_base")
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q", "v"))
    fit(dataclasses.replace(config, init=f"{bucket.url}_base", lora=lora), bucket.url)
    assert load_adapters(bucket.url).lora == lora
    assert zj.load_model(bucket.url).lineage["step"] == 1
