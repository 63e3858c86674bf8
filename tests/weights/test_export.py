"""Training checkpoints to Hugging Face folders and back: bits, model card, and no optimizer."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import port_files
import pytest
import runs
from gguf_files import types_of
from port_files import assert_same_tree, random_tree
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.storage import seal
from zephyr_jax.training.loop import fit
from zephyr_jax.training.setup import setup
from zephyr_jax.weights.checkpoint import Model, params_digest
from zephyr_jax.weights.gguf import export_gguf

config_of = runs.config_of
tok, cfg, params = port_files.tok, port_files.cfg, port_files.params


@pytest.fixture
def run(sft_run, tmp_path):
    """A copy of a run with checkpoints of steps 5 and 10, on one device."""
    with runs.mesh_of(runs.ONE):
        yield sft_run.copied(tmp_path / "run")


PORT, GGUF = ["port_weights", "export"], ["--format=gguf"]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def export(source, folder, *words):
    main(["port_weights", "export", str(source), str(folder), *words])
    return weights(folder)


def test_an_export_needs_no_optimizer(sft_run, run, tmp_path):
    first = export(run, tmp_path / "first", "--dtype=float32")
    for path in (run / "checkpoints").glob("*/opt_state/**/*"):
        if path.is_file():
            path.write_bytes(b"no reader can make sense of this")
    assert export(run, tmp_path / "second", "--dtype=float32") == first
    with pytest.raises(ValueError, match=r"none of the checkpoints .*opt_state/.* is damaged"):
        fit(sft_run.config, run)
    for path in (run / "checkpoints").glob("*/opt_state"):
        shutil.rmtree(path)
    assert export(run / "checkpoints" / "10", tmp_path / "third", "--dtype=float32") == first


@pytest.mark.parametrize("how", ["flipped", "without digests", "without digests, flipped", "meta"])
def test_parameters_that_changed_are_never_exported(run, how):
    def damage(step):
        folder = run / "checkpoints" / step
        if "without" in how:
            (folder / "digests.json").unlink()
        if "flipped" in how:
            runs.flip_a_bit(folder / "params")
        if how == "meta":
            path = folder / "meta" / "metadata"
            path.write_text(path.read_text().replace('"sealed": true', '"sealed": tru'))

    damage("10")
    assert zj.load_model(run).lineage["step"] == 5
    damage("5")
    with pytest.raises(ValueError, match=r"none of the checkpoints .*10/.* is (damaged|missing)"):
        zj.load_model(run)


def test_a_checkpoint_of_the_first_release_is_read_unchecked(run, tmp_path, capsys):
    """It has no digests, and does not say that it should."""
    first = export(run, tmp_path / "first")
    folder = run / "checkpoints" / "10"
    (folder / "digests.json").unlink()
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace(', "sealed": true', ""))
    assert export(run, tmp_path / "second") == first
    assert "10 has no digests.json, so its files are not checked" in capsys.readouterr().err
    assert not (folder / "digests.json").exists()  # a reader writes nothing


def test_the_card_lists_the_whole_lineage(world, sft_run, run, tmp_path):
    """SFT -> DPO, with digests of the data and of the parameters that DPO began with."""
    dpo = dataclasses.replace(config_of(world, "dpo"), init=str(run))
    sft, meta = zj.load_model(run), setup(dpo, tmp_path / "dpo").meta
    zj.save_model(sft._replace(lineage=meta | {"step": 0}), tmp_path / "dpo")
    (tmp_path / "dpo" / "metrics.jsonl").write_text('{"step": 0, "split": "eval", "eval_loss": 2}')
    export(tmp_path / "dpo", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    lines = [line for line in card.splitlines() if re.match(r"\d\. ", line)]
    data = [meta["dataset_digest"] for meta in (sft.lineage, meta)]
    sets = [f"{one.data.dataset} {one.data.splits[0]}" for one in (sft_run.config, dpo)]
    assert lines[0] == "1. random weights"
    for i, recipe in enumerate(("SFT by the recipe demo_sft", "DPO by the recipe demo_dpo")):
        assert lines[i + 1].startswith(f"{i + 2}. {recipe}, 10 steps on {sets[i]}")
        assert data[i][:16] in lines[i + 1]
    assert params_digest(sft.params)[:16] in lines[2]
    assert f"| {sets[1]} | {data[1]} |" in card
    assert f"| packed set | {meta['packed']} |" in card
    assert f"| reference | {meta['reference_digest']} |" in card
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert zj.RunConfig.from_config_dict(recipe) == dpo
    assert "| eval_loss | 2 |" in card


def test_import_export_import_keeps_every_bit(cfg, tok, tmp_path):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=True, dtype="bfloat16")
    params, folder = random_tree(cfg, "bfloat16"), tmp_path / "in"
    zj.export_hf(cfg, params, tok, folder, dtype="bfloat16", max_shard_bytes=50_000)
    first = weights(folder)
    assert len(first) > 2
    main(["port_weights", "import", str(folder), str(tmp_path / "ours")])
    zj.export_hf(
        *zj.load_model(tmp_path / "ours", dtype="bfloat16")[:3], tmp_path / "out",
        dtype="bfloat16", max_shard_bytes=50_000,
    )  # fmt: skip
    assert weights(tmp_path / "out") == first
    for source in (folder, tmp_path / "ours", tmp_path / "out"):
        assert_same_tree(params, zj.load_model(source, dtype="bfloat16").params)


def test_an_export_holds_what_its_source_held(cfg, params, tok, tmp_path, capsys):
    """By the files' own types, whatever config.json says; a run's by its computation."""
    for held in ("float32", "bfloat16", "float16"):
        zj.export_hf(cfg, params, tok, tmp_path / held, dtype=held)
        config = json.loads((tmp_path / held / "config.json").read_text()) | {"dtype": "float32"}
        (tmp_path / held / "config.json").write_text(json.dumps(config))
        (tmp_path / held / "digests.json").unlink()
    narrow = load_file(tmp_path / "bfloat16" / "model.safetensors")
    shutil.copytree(tmp_path / "bfloat16", tmp_path / "mixed")
    wide = {k: x.astype(np.float32) if "norm" in k else x for k, x in narrow.items()}
    save_file(wide, tmp_path / "mixed" / "model.safetensors")
    model = Model(dataclasses.replace(cfg, dtype="bfloat16"), params, tok, {"lineage": ["x"]})
    zj.save_model(model, tmp_path / "r[u]n*?")
    for kind in ("float16", "q8_0"):
        export_gguf(cfg, params, tok, tmp_path / f"{kind}.gguf", dtype=kind)
    expected = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "mixed": "F32"}
    expected |= {"r[u]n*?": "BF16", "float16.gguf": "F16", "q8_0.gguf": "F16"}
    for source, kind in expected.items():
        export(tmp_path / source, tmp_path / "out", "--overwrite")
        with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
            names = file.keys()
            assert {file.get_slice(name).get_dtype() for name in names} == {kind}, source
        assert "; its matrices are written in " in capsys.readouterr().err
        main([*PORT, str(tmp_path / source), str(tmp_path / "o.gguf"), *GGUF, "--overwrite"])
        written = types_of(tmp_path / "o.gguf")["blk.0.ffn_down.weight"]
        assert written == ("Q8_0" if "q8_0" in source else kind)


def test_an_export_replaces_another_only_when_asked(cfg, params, tok, tmp_path, refused):
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    for target, words in (("out", ()), ("out.gguf", GGUF), ("folder", GGUF)):
        words = [*PORT, str(tmp_path / "hf"), str(tmp_path / target), *words]
        main(words)
        assert "holds an earlier export; --overwrite replaces it" in refused(*words)
        main([*words, "--overwrite"])


def test_a_checkpoint_is_read_on_another_mesh_than_it_was_written_on(
    cfg, params, tok, tmp_path, monkeypatch
):
    chunk = "zephyr_jax.weights.checkpoint.CHUNK_BYTES"
    monkeypatch.setattr(chunk, 3000)  # chunks that no device's part fits
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    for written, read in (((1, 1, 1), (2, 2, 2)), ((1, 8, 1), (1, 2, 4))):
        target = tmp_path / str(written)
        with runs.mesh_of(runs.MeshConfig(*written)):
            zj.save_model(zj.load_model(tmp_path / "hf"), target)
        with runs.mesh_of(runs.MeshConfig(*read)):
            loaded = zj.load_model(target).params
            assert jax.tree.map(lambda x: x.sharding, loaded) == param_shardings(cfg)
        assert_same_tree(params, loaded)


def test_a_checkpoint_that_does_not_fit_its_meta_is_refused(cfg, tok, tmp_path):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=True)
    model = Model(cfg, random_tree(cfg), tok, {"lineage": ["random weights"]})
    zj.save_model(model, tmp_path / "ours")
    path = tmp_path / "ours" / "checkpoints" / "0" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for change, match in (
        ({"vocab_size": 425}, r"embed in .* is \(424, 48\), expected \(425, 48\)"),
        ({"tie_word_embeddings": False}, "holds no array head that can be read"),
    ):
        path.write_text(json.dumps(meta | {"model": meta["model"] | change}))
        seal(path.parents[1])
        with pytest.raises(ValueError, match=match):
            zj.load_model(tmp_path / "ours")


def test_parameters_come_in_the_requested_dtype(cfg, params, tok, tmp_path):
    zj.save_model(Model(cfg, params, tok, {"lineage": ["random weights"]}), tmp_path / "ours")
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    for source in ("ours", "hf"):
        for dtype in ("float32", "bfloat16", "float16"):
            narrow = jax.tree.map(lambda x, dtype=dtype: x.astype(jax.numpy.dtype(dtype)), params)
            assert_same_tree(narrow, zj.load_model(tmp_path / source, dtype=dtype).params)
    with pytest.raises(ValueError, match="dtype='int8' is not supported; use one of float32"):
        zj.load_model(tmp_path / "hf", dtype="int8")
    wide = jax.tree.map(lambda x: x * np.float32(1e8), params)
    zj.save_model(Model(cfg, wide, tok, {"lineage": ["random weights"]}), tmp_path / "wide")
    with pytest.raises(ValueError, match="float16's largest; use bfloat16"):
        zj.load_model(tmp_path / "wide", dtype="float16")


def test_verify_compares_a_model_and_what_it_was_imported_from(
    cfg, params, tok, tmp_path, refused, capsys
):
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    main(["port_weights", "import", str(tmp_path / "hf"), str(tmp_path / "ours")])
    words = ["port_weights", "verify", str(tmp_path / "ours")]
    (tmp_path / "hf" / "README.md").write_text("A card of the user's own.")
    for folder in ("hf", "ours", "ours/checkpoints/0"):
        main([*words[:2], str(tmp_path / folder)])
        assert f"{folder} is as it was written" in capsys.readouterr().err
    runs.flip_a_bit(tmp_path / "hf")
    assert "hf/model.safetensors is damaged" in refused(*words[:2], tmp_path / "hf")
    assert "ours was imported from other bytes" in refused(*words)
    shutil.rmtree(tmp_path / "hf")
    main(words)
    assert "hf, which is gone" in capsys.readouterr().err
    (tmp_path / "ours" / "tokenizer.model").write_bytes(train_model(vocab_size=400))
    with pytest.raises(ValueError, match=r"the tokenizer in .*ours changed"):
        zj.load_model(tmp_path / "ours")


def test_weights_that_are_no_numbers_are_refused(cfg, params, tok, tmp_path, refused):
    broken = jax.tree.map(np.copy, params)
    broken["layers"]["mlp"]["up"][1, 2, 3] = np.nan
    for write, place in ((zj.export_hf, "hf"), (export_gguf, "x.gguf")):
        with pytest.raises(ValueError, match=r"(layers.1|blk.1).*up.* are not finite; take a chec"):
            write(cfg, broken, tok, tmp_path / place)
    assert not list(tmp_path.iterdir())
    bad = zj.export_hf(cfg, params, tok, tmp_path / "bad")
    (bad / "digests.json").unlink()
    tensors = load_file(bad / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = np.inf
    save_file(tensors, bad / "model.safetensors")
    port = ["port_weights", "import", bad, tmp_path / "ours"]
    for words in (port, ["generate", "--prompt=x", f"--model={bad}"]):
        assert f"['head'] has values that are not finite in {bad}; restore" in refused(*words)


def test_a_disk_without_room_is_named_before_work_begins(cfg, params, tok, tmp_path, monkeypatch):
    zj.export_hf(cfg, params, tok, tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    message = r"{} needs 0.0\d+ GB, and 1e-06 GB are free on its disk: remove"
    for name, write in (("out", zj.export_hf), ("out.gguf", export_gguf)):
        with pytest.raises(ValueError, match=message.format(name)):
            write(cfg, params, tok, tmp_path / name)
    with pytest.raises(ValueError, match=message.format("ours")):
        zj.save_model(zj.load_model(tmp_path / "hf"), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
