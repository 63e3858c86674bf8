"""Safetensors files, which others read too, and arrays that are read straight into place."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zephyr_jax.weights.layouts import from_parts
from zephyr_jax.weights.safetensors import INDEX, SINGLE, SafetensorsReader, write_safetensors

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHAPES = {"b": (6, 10), "a": (7,), "c": (2, 3, 4), "d": (5, 8)}


def tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=shape).astype(DTYPES[dtype]) for k, shape in SHAPES.items()}


def write(folder, arrays, dtype="float32", **options):
    write_safetensors(folder, SHAPES, dtype, iter(arrays.items()), **options)
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_written_comes_back_and_others_read_it(tmp_path, dtype):
    arrays = tensors(dtype)
    assert write(tmp_path, arrays, dtype) == [SINGLE]
    theirs = load_file(tmp_path / SINGLE)
    for path in (tmp_path, tmp_path / SINGLE):
        reader = SafetensorsReader(path)
        assert reader.shapes == SHAPES
        reader.check_dtypes(SHAPES)
        for name, array in arrays.items():
            assert_same(reader.read(name), array)
            assert_same(theirs[name], array)
        assert_same(reader.read("b", [slice(1, 3), slice(4, 9)]), arrays["b"][1:3, 4:9].copy())
        assert_same(reader.read("c", [slice(1, 2)]), arrays["c"][1:2].copy())
    (length,) = struct.unpack("<Q", (tmp_path / SINGLE).read_bytes()[:8])
    assert length % 8 == 0  # the tensors behind the header are aligned
    header = json.loads((tmp_path / SINGLE).read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt", "writer": "zephyr_jax"}


def test_shards_hold_what_the_index_says(tmp_path):
    arrays = tensors()
    files = write(tmp_path, arrays, max_shard_bytes=260)
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {"b": files[0], "a": files[1], "c": files[1], "d": files[2]}
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for x in arrays.values()),
        "total_parameters": sum(x.size for x in arrays.values()),
    }
    reader = SafetensorsReader(tmp_path)
    for name, file in index["weight_map"].items():
        assert_same(load_file(tmp_path / file)[name], arrays[name])
        assert_same(reader.read(name), arrays[name])


def test_broken_folders_are_named_in_one_line(tmp_path):
    def error(kind, match, folder=tmp_path):
        with pytest.raises(kind, match=match) as caught:
            SafetensorsReader(folder)
        assert "\n" not in str(caught.value)

    error(FileNotFoundError, "none lacks none", tmp_path / "none")
    error(FileNotFoundError, "holds neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    error(FileNotFoundError, r".bin files are pickles.*save the model as safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    arrays = tensors()
    files = write(tmp_path, arrays, max_shard_bytes=260)
    shard, index = tmp_path / files[1], tmp_path / INDEX
    index.write_text(index.read_text().replace(files[1], files[2], 1))
    error(ValueError, f"tensor a is not in {files[2]}; copy or")
    save_file({name: arrays[name] for name in "ad"}, tmp_path / files[2])
    error(ValueError, f"tensor a is in {files[1]} and in {files[2]}; copy or")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    error(ValueError, f"{files[1]} is truncated or corrupt \\({len(whole) - 4} bytes")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    error(ValueError, "git-lfs pointer")
    shard.unlink()
    (tmp_path / files[0]).unlink()
    error(FileNotFoundError, f"lacks {files[0]}, {files[1]}; copy")
    for weight_map in (["x"], {}, {"a": "../x"}, {"a": "/x"}, {"a": 3}, {"a": "x" * 999}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        error(ValueError, "names .*, no file of its folder")
    for content in ("{}", "[" * 100_000):
        (tmp_path / INDEX).write_text(content)
        error(ValueError, "is damaged")


ARRAY = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)


def test_every_part_is_read_once_however_many_devices_hold_it():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    parts = []

    def read(part):
        parts.append(part)
        return ARRAY[part]

    for spec, reads in ((jax.P(None, "fsdp"), 4), (jax.P(), 1), (jax.P("data", "fsdp"), 8)):
        parts.clear()
        sharding = jax.NamedSharding(mesh, spec)
        array = from_parts(ARRAY.shape, sharding, read)
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, ARRAY)
        assert len(parts) == reads
