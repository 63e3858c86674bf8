"""GGUF through the command line: one command each way, and one line where something is wrong."""

import sys

import pytest
from gguf_files import assert_same_tree, fields_of, gguf, random_tree, rewritten, small_config
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.weights.checkpoint import find_tokenizer, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face export of a small model."""
    cfg, tok = small_config(), SentencePieceTokenizer(train_model())
    path = tmp_path_factory.mktemp("source") / "hf"
    return zj.export_hf(cfg, random_tree(cfg), tok, path)


def failure(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["port_weights", *map(str, words)])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_gguf_file_becomes_a_checkpoint_with_one_command(folder, tmp_path, capsys):
    file, model = tmp_path / "a.gguf", zj.load_model(folder)
    main(["port_weights", "export", str(folder), str(file), "--format=gguf", "--dtype=float32"])
    assert fields_of(file)["zephyr_jax.lineage"] == [f"ported from {folder}"]
    # A file of another program's, which has no key of ours.
    other = rewritten(file, tmp_path / "other.gguf", {"zephyr_jax.config": None})
    main(["port_weights", "import", str(other), str(tmp_path / "checkpoint")])
    got = zj.load_model(tmp_path / "checkpoint")
    assert_same_tree(got.params, model.params)
    assert got.cfg.sliding_window is None
    assert got.lineage["lineage"] == ["ported from other.gguf"]
    words = ["generate", f"--model={tmp_path / 'checkpoint'}", "--prompt=Hello"]
    main([*words, "--max_new_tokens=2", "--temperature=0"])
    capsys.readouterr()
    direct = zj.load_model(file)
    assert_same_tree(direct.params, model.params)
    assert direct.cfg == model.cfg
    assert direct.tokenizer.merge_pieces() == model.tokenizer.merge_pieces()
    beside = find_tokenizer(resolve(str(file), weights=False))  # as a run's `init` asks for it
    assert beside.digest == direct.tokenizer.digest


def test_an_export_goes_into_a_folder_by_its_name(folder, tmp_path):
    target = tmp_path / "models" / "me" / "small-GGUF"
    main(["port_weights", "export", str(folder), str(target), "--format=gguf"])
    (file,) = target.iterdir()
    assert file.name == "small-117K-F16.gguf"
    assert {t.tensor_type.name for t in gguf.GGUFReader(file).tensors} == {"F16", "F32"}
    assert fields_of(file)["llama.context_length"] == 64


def test_bad_input_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def export(target, *words):
        return failure(capsys, "export", folder, tmp_path / target, *words)

    assert "--dtype=q8_0 belongs to an export with --format=gguf" in export("x", "--dtype=q8_0")
    said = export("x.gguf", "--format=gguf", "--push=x")
    assert "cannot be pushed to; name it org/name" in said
    (tmp_path / "x.gguf").write_text("mine")
    assert "is not an export of zephyr_jax" in export("x.gguf", "--format=gguf")
    said = failure(capsys, "import", tmp_path / "x.gguf", tmp_path / "checkpoint")
    assert "is no GGUF file" in said
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'zephyr_jax[gguf]'" in export("y.gguf", "--format=gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]
