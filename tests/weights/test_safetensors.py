import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zephyr_jax.weights.safetensors import (
    INDEX,
    SINGLE,
    SafetensorsReader,
    TensorSpec,
    plan_shards,
    write_safetensors,
)

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"b": (6, 10), "a": (7,), "c": (2, 3, 4), "d": (5, 8)}
    return {k: rng.normal(size=s).astype(DTYPES[dtype]) for k, s in shapes.items()}


def specs(arrays: dict[str, np.ndarray]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(str(x.dtype), x.shape) for k, x in arrays.items()}


def write(folder, arrays, **options):
    return write_safetensors(folder, specs(arrays), iter(arrays.items()), **options)


def assert_same(a, b):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_written_comes_back_and_others_read_it(tmp_path, dtype):
    arrays = tensors(dtype)
    assert write(tmp_path, arrays) == [SINGLE]
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    theirs = load_file(tmp_path / SINGLE)
    for path in (tmp_path, tmp_path / SINGLE):
        with SafetensorsReader(path) as reader:
            assert reader.names == sorted(arrays)
            for name, array in arrays.items():
                assert reader.spec(name) == TensorSpec(dtype, array.shape)
                assert_same(reader.read(name), array)
                assert_same(theirs[name], array)
    (length,) = struct.unpack("<Q", (tmp_path / SINGLE).read_bytes()[:8])
    assert length % 8 == 0  # the tensors behind the header are aligned
    header = json.loads((tmp_path / SINGLE).read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt", "writer": "zephyr_jax"}


def test_shards_hold_what_the_index_says(tmp_path):
    arrays = tensors()
    files = write(tmp_path, arrays, max_shard_bytes=260)
    assert files[:-1] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files[-1] == INDEX
    assert {p.name for p in tmp_path.iterdir()} == set(files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {"b": files[0], "a": files[1], "c": files[1], "d": files[2]}
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for x in arrays.values()),
        "total_parameters": sum(x.size for x in arrays.values()),
    }
    for name, file in index["weight_map"].items():
        assert_same(load_file(tmp_path / file)[name], arrays[name])
    with SafetensorsReader(tmp_path) as reader:
        for name, array in arrays.items():
            assert_same(reader.read(name), array)


def test_plan_fills_files_up_to_the_limit_and_no_further():
    wanted = {
        name: TensorSpec("bfloat16", (n,)) for name, n in zip("abcd", (4, 6, 11, 1), strict=True)
    }
    assert [list(s) for s in plan_shards(wanted, 20).values()] == [["a", "b"], ["c"], ["d"]]
    assert list(plan_shards(wanted, 44)) == [SINGLE]
    assert len(plan_shards(wanted, 43)) == 2
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        plan_shards(wanted, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_is_read_alone(tmp_path, dtype):
    arrays = tensors(dtype)
    write(tmp_path, arrays)
    with SafetensorsReader(tmp_path) as reader:
        assert_same(reader.read("b", [slice(1, 3), slice(4, 9)]), arrays["b"][1:3, 4:9].copy())
        assert_same(reader.read("c", [slice(1, 2)]), arrays["c"][1:2].copy())


def test_a_wrong_tensor_stops_the_writer_and_leaves_nothing(tmp_path):
    arrays = tensors()
    good, other = specs(arrays), arrays | {"c": arrays["c"].T}
    for bad in (
        other,
        {"a": arrays["a"]},
        {k: x.astype(np.float16) for k, x in arrays.items()},
        {},
    ):
        with pytest.raises(ValueError, match="expected tensor"):
            write_safetensors(tmp_path, good, iter(bad.items()))
        assert not list(tmp_path.iterdir())


def test_tensors_are_asked_for_one_at_a_time(tmp_path):
    arrays = tensors()
    events = []

    def source():
        for name, array in arrays.items():
            events.append((name, sum(p.stat().st_size for p in tmp_path.iterdir())))
            yield name, array

    write_safetensors(tmp_path, specs(arrays), source(), max_shard_bytes=1)
    assert [name for name, _ in events] == list(arrays)
    assert events[0][1] < events[1][1] < events[2][1]  # the one before is on disk already


def test_broken_folders_are_named_in_one_line(tmp_path):
    def error(kind, match, folder=tmp_path):
        with pytest.raises(kind, match=match) as caught:
            SafetensorsReader(folder)
        assert "\n" not in str(caught.value)

    error(FileNotFoundError, "neither a folder nor a safetensors file", tmp_path / "none")
    error(FileNotFoundError, "holds neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    error(FileNotFoundError, r"only .bin files.*save the model as safetensors")
    arrays = tensors()
    files = write(tmp_path, arrays, max_shard_bytes=260)
    shard = tmp_path / files[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    error(ValueError, f"{files[1]} is truncated or corrupt \\({len(whole) - 4} bytes")
    shard.write_bytes(b"")
    error(ValueError, f"{files[1]} is truncated or corrupt \\(0 bytes")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    error(ValueError, "git-lfs pointer")
    shard.unlink()
    (tmp_path / files[0]).unlink()
    error(FileNotFoundError, f"lacks {files[0]}, {files[1]}, which {INDEX} names")
    write(tmp_path, arrays, max_shard_bytes=260)
    save_file({"a": arrays["a"]}, shard)
    error(ValueError, f"names tensors that their files lack: c \\({files[1]}\\)")
    (tmp_path / INDEX).write_text("{}")
    error(ValueError, "is no safetensors index")


def test_other_dtypes_are_refused(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader, pytest.raises(ValueError, match="has dtype I64"):
        reader.spec("a")
