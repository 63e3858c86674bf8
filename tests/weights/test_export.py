"""Training checkpoints to Hugging Face folders and back: bits, model card, and no optimizer."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import test_loop
from flax import traverse_util
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.models.parameters import param_shapes, param_shardings
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checkpoint import Model
from zephyr_jax.weights.digest import params_digest

config_of, one_device = test_loop.config_of, test_loop._one_device


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def export(source, folder, *words):
    main(["port_weights", "export", str(source), str(folder), *words])
    return weights(folder)


def random_params(cfg, dtype):
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=s).astype(dtype) for k, s in param_shapes(cfg).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def test_an_export_needs_no_optimizer(world, tmp_path):
    config = config_of(world, "sft", max_steps=2, checkpoint_every=1)
    run = tmp_path / "run"
    zj.fit(config, run)
    first = export(run, tmp_path / "first", "--dtype=float32")
    for path in (run / "checkpoints").glob("*/opt_state/**/*"):
        if path.is_file():
            path.write_bytes(b"no reader can make sense of this")
    assert export(run, tmp_path / "second", "--dtype=float32") == first
    assert zj.load_model(run).lineage["step"] == 2
    with pytest.raises(ValueError, match=r"none of the checkpoints .*opt_state/.* is changed"):
        zj.fit(config, run)
    for path in (run / "checkpoints").glob("*/opt_state"):
        shutil.rmtree(path)
    assert export(run / "checkpoints" / "2", tmp_path / "third", "--dtype=float32") == first
    with pytest.raises(ValueError, match=r"none of the checkpoints .*opt_state/.* is missing"):
        zj.fit(config, run)
    for path in (run / "checkpoints").glob("*.sums.json"):
        path.unlink()
    assert export(run, tmp_path / "fourth", "--dtype=float32") == first
    assert not list((run / "checkpoints").glob("*.sums.json"))  # a reader writes nothing


def flip_a_bit(folder):
    """In the middle of the largest file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_parameters_that_changed_are_never_exported(world, tmp_path):
    run = tmp_path / "run"
    zj.fit(config_of(world, "sft", max_steps=2, checkpoint_every=1), run)
    flip_a_bit(run / "checkpoints" / "2" / "params")
    assert zj.load_model(run).lineage["step"] == 1
    flip_a_bit(run / "checkpoints" / "1" / "params")
    with pytest.raises(ValueError, match=r"none of the checkpoints .*2/params/.* is changed"):
        zj.load_model(run)


def test_the_card_tells_the_whole_chain(world, tmp_path):
    """Base -> SFT -> DPO, with digests of the data and of the parameters that each began with."""
    sft = config_of(world, "sft", max_steps=2)
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    base = zj.init_params(sft.model, jax.random.key(3))
    zj.export_hf(sft.model, base, tok, tmp_path / "base")
    sft = dataclasses.replace(sft, init=str(tmp_path / "base"))
    after = zj.fit(sft, tmp_path / "sft")
    dpo = dataclasses.replace(config_of(world, "dpo", max_steps=2), init=str(tmp_path / "sft"))
    zj.fit(dpo, tmp_path / "dpo")
    export(tmp_path / "dpo", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    meta = [zj.load_model(tmp_path / name).lineage for name in ("sft", "dpo")]
    data = [one["dataset_digest"] for one in meta]
    began = [params_digest(x) for x in (base, after.params)]
    sets = [f"{one.data.dataset} {one.data.train_split}" for one in (sft, dpo)]
    for line in (
        f"1. ported from {tmp_path / 'base'}\n",
        f"2. SFT by the recipe demo_sft, 2 steps on {sets[0]} (digest {data[0][:16]}), "
        f"begun with parameters of digest {began[0][:16]}\n",
        f"3. DPO by the recipe demo_dpo, 2 steps on {sets[1]} (digest {data[1][:16]}), "
        f"begun with parameters of digest {began[1][:16]}\n",
        f"| {sets[1]} | {data[1]} |",
        f"| packed set | {meta[1]['packed']} |",
        f"| reference | {meta[1]['reference_digest']} |",
    ):
        assert line in card
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert zj.RunConfig.from_config_dict(recipe) == dpo
    last = read_metrics(tmp_path / "dpo" / "metrics.jsonl")[-1]
    assert (last["split"], last["step"]) == ("eval", 2)
    assert f"| eval_rewards/accuracies | {last['eval_rewards/accuracies']} |" in card
    export(tmp_path / "dpo" / "checkpoints" / "2", tmp_path / "of_a_step")
    again = (tmp_path / "of_a_step" / "README.md").read_text()
    assert again.split("\n", 12)[12] == card.split("\n", 12)[12]  # but for the folder's name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_gb", ["1", "0.00005"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_export_import_keeps_every_bit(tmp_path, dtype, shard_gb, tied):
    tok = SentencePieceTokenizer(train_model())
    tiny = zj.MistralConfig.tiny()
    cfg = dataclasses.replace(tiny, vocab_size=424, tie_word_embeddings=tied, dtype=dtype)
    params = random_params(cfg, dtype)
    folder = tmp_path / "in"
    zj.export_hf(cfg, params, tok, folder, dtype=dtype, max_shard_bytes=int(float(shard_gb) * 1e9))
    first = weights(folder)
    assert (len(first) > 2) == (shard_gb != "1")
    main(["port_weights", "import", str(folder), str(tmp_path / "ours")])
    words = (f"--dtype={dtype}", f"--max_shard_gb={shard_gb}")
    assert export(tmp_path / "ours", tmp_path / "out", *words) == first
    zj.save_model(zj.load_model(tmp_path / "out", dtype=dtype), tmp_path / "again")
    for source in (folder, tmp_path / "ours", tmp_path / "out", tmp_path / "again"):
        got = zj.load_model(source, dtype=dtype)
        assert isinstance(got, Model)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(got.params), strict=True):
            b = np.asarray(b)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (XLA_FLAGS of conftest)")
def test_a_checkpoint_is_read_on_another_mesh_than_it_was_written_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "zephyr_jax.weights.checkpoint.CHUNK_BYTES", 3000
    )  # chunks that no device's part fits
    tok = SentencePieceTokenizer(train_model())
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=424)
    params = random_params(cfg, "float32")
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    meshes = [
        test_loop.MeshConfig(*sizes) for sizes in ((1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4))
    ]
    for written in meshes:
        with test_loop.mesh_of(written):
            zj.save_model(zj.load_model(tmp_path / "hf"), tmp_path / str(written))
        for read in meshes:
            with test_loop.mesh_of(read):
                got = zj.load_model(tmp_path / str(written)).params
                wanted = param_shardings(cfg)
            assert jax.tree.map(lambda x: x.sharding, got) == wanted
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(got), strict=True):
                assert a.tobytes() == np.asarray(b).tobytes()


def test_a_checkpoint_that_does_not_fit_its_meta_is_refused(tmp_path):
    tok = SentencePieceTokenizer(train_model())
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=424, tie_word_embeddings=True)
    model = Model(cfg, random_params(cfg, "float32"), tok, {"lineage": ["random weights"]})
    zj.save_model(model, tmp_path / "ours")
    path = tmp_path / "ours" / "checkpoints" / "0" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    (tmp_path / "ours" / "checkpoints" / "0.sums.json").unlink()
    for change, match in (
        ({"vocab_size": 425}, r"embed in .* is \(424, 48\), expected \(425, 48\)"),
        ({"tie_word_embeddings": False}, "holds no array head that can be read"),
    ):
        path.write_text(json.dumps(meta | {"model": meta["model"] | change}))
        with pytest.raises(ValueError, match=match):
            zj.load_model(tmp_path / "ours")


def test_parameters_come_in_the_dtype_that_is_asked_for(tmp_path):
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=424)
    tok = SentencePieceTokenizer(train_model())
    params = jax.tree.map(jax.numpy.asarray, random_params(cfg, "float32"))
    zj.save_model(Model(cfg, params, tok, {"lineage": ["random weights"]}), tmp_path / "ours")
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    for source in ("ours", "hf"):
        for dtype in ("float32", "bfloat16", "float16"):
            got = zj.load_model(tmp_path / source, dtype=dtype).params
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(got), strict=True):
                assert b.dtype == dtype
                np.testing.assert_array_equal(np.asarray(a).astype(dtype), np.asarray(b))
    with pytest.raises(ValueError, match="dtype='int8' is not supported; use one of float32"):
        zj.load_model(tmp_path / "hf", dtype="int8")
    wide = jax.tree.map(lambda x: x * 1e8, params)
    zj.save_model(Model(cfg, wide, tok, {"lineage": ["random weights"]}), tmp_path / "wide")
    zj.export_hf(cfg, wide, tok, tmp_path / "wide_hf")
    for source in ("wide", "wide_hf"):
        with pytest.raises(ValueError, match="float16's largest; use bfloat16"):
            zj.load_model(tmp_path / source, dtype="float16")


def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    for words, said in (
        (["export", "org/none", str(tmp_path)], "is not an export of zephyr_jax (it holds mine"),
        (["import", "org/none", str(tmp_path)], "exists and is not empty"),
        (["import", "org/none", "x", "--push=org/x"], "--push uploads an export"),
        (["export", "org/none", "x", "--public"], "--public is about the repository of --push"),
        (["export", "org/none", "x", "--push=x"], "cannot be pushed to; name it org/name"),
    ):
        with pytest.raises(SystemExit):
            main(["port_weights", *words])
        assert said in capsys.readouterr().err
