"""Packed sets that lie behind a URL: a folder of this machine plays the bucket."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from buckets import stand_in
from runs import config_of
from test_packed import contents

import zephyr_jax as zj
from zephyr_jax.data.packing.packed import build_packed, open_packed
from zephyr_jax.training.setup import pack


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder in the place of gs://bucket, for all of epath; the number of bytes read from it."""
    here = tmp_path / "bucket"
    here.mkdir()
    opened = []
    stand_in(monkeypatch, here, opened)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return here, opened


def test_a_set_in_a_bucket_is_copied_once(world, bucket, tmp_path):
    config, cache = config_of(world, "sft"), tmp_path / "cache" / "zephyr_jax" / "packed"
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    local = pack(config, 1)
    here, opened = bucket
    data = dataclasses.replace(config.data, data_dir="gs://bucket/data")
    far = dataclasses.replace(config, data=data)
    shutil.copytree(Path(config.data.data_dir) / "ultrachat", here / "data" / "ultrachat")
    assert open_packed(far, tok, 2) is None
    with pytest.raises(ValueError, match="packing needs a local data_dir; pack there with"):
        build_packed(far, tok, 2)
    there = here / "data" / "packed" / local.folder.name
    shutil.copytree(local.folder, there)
    # a copy that went wrong appears nowhere
    name = "train.array_record"
    content = (there / name).read_bytes()
    (there / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* its manifest says"):
        open_packed(far, tok, 2)
    assert not (cache / local.folder.name).exists()
    (there / name).write_bytes(content)
    made = open_packed(far, tok, 2)
    assert made.home == f"gs://bucket/data/packed/{local.folder.name}"
    assert made.folder == cache / local.folder.name
    assert contents(made.folder) == contents(local.folder)
    n = made.manifest["splits"]["eval"]["rows"]
    assert (made.rows("eval").read(range(n)) == local.rows("eval").read(range(n))).all()
    opened.clear()
    assert open_packed(far, tok, 2) == made
    assert not [path for path in opened if "array_record" in path]
