"""Packed sets that lie behind a URL: a folder of this machine plays the bucket."""

import shutil
from pathlib import Path

import pytest
from buckets import stand_in
from conftest import with_fields
from runs import config_of
from test_packed import contents

import zephyr_jax as zj
from zephyr_jax.data.packing.packed import build_packed, open_packed
from zephyr_jax.training.setup import pack


def test_a_set_in_a_bucket_is_copied_once(world, monkeypatch, tmp_path):
    here, opened = tmp_path / "bucket", []
    here.mkdir()
    stand_in(monkeypatch, here, opened)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    config = config_of(world, "sft")
    local = pack(config)
    copy = tmp_path / "cache" / "zephyr_jax" / "packed" / local.folder.name
    far = with_fields(config, data={"data_dir": "gs://bucket/data"})
    shutil.copytree(Path(config.data.data_dir) / "ultrachat", here / "data" / "ultrachat")
    assert open_packed(far, tok) is None
    with pytest.raises(ValueError, match="packing needs a local data_dir; pack there with"):
        build_packed(far, tok)
    there = here / "data" / "packed" / local.folder.name
    shutil.copytree(local.folder, there)
    # a copy that went wrong appears nowhere
    name = "train.array_record"
    content = (there / name).read_bytes()
    (there / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged .*: copy the packed set to gs://"):
        open_packed(far, tok)
    assert not copy.exists()
    (there / name).write_bytes(content)
    made = open_packed(far, tok)
    assert made.home == f"gs://bucket/data/packed/{local.folder.name}"
    assert made.folder == copy
    assert contents(made.folder) == contents(local.folder)
    opened.clear()
    assert open_packed(far, tok) == made
    assert not [path for path in opened if "array_record" in path]
