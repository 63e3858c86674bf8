"""What GGUF export and import refuse, and that nothing is left half-written."""

import dataclasses
import struct
import sys

import numpy as np
import pytest
from gguf_files import fields_of, gguf, random_tree, rewritten, small_config
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.weights.gguf import export_gguf, load_gguf


@pytest.fixture(scope="module")
def tok() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model())


@pytest.fixture(scope="module")
def cfg() -> zj.MistralConfig:
    return small_config()


@pytest.fixture(scope="module")
def params(cfg):
    return random_tree(cfg)


@pytest.fixture(scope="module")
def exported(cfg, params, tok, tmp_path_factory):
    return export_gguf(
        cfg, params, tok, tmp_path_factory.mktemp("gguf") / "model.gguf", dtype="float32"
    )


def test_an_export_replaces_only_an_export(cfg, params, tok, tmp_path):
    path = tmp_path / "a.gguf"
    export_gguf(cfg, params, tok, path, dtype="float32")
    export_gguf(cfg, params, tok, path, dtype="float16")
    assert fields_of(path)["general.file_type"] == 1
    for foreign in (b"notes", rewritten(path, tmp_path / "b", {"zephyr_jax.config": None})):
        content = foreign if isinstance(foreign, bytes) else foreign.read_bytes()
        path.write_bytes(content)
        with pytest.raises(FileExistsError, match="were not written by zephyr_jax"):
            export_gguf(cfg, params, tok, path)
        assert path.read_bytes() == content


def test_an_export_that_fails_leaves_what_was_there(cfg, params, tok, tmp_path, monkeypatch):
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32")
    before = path.read_bytes()
    seen = []

    def fail(array, kind):
        seen.append(kind)
        if len(seen) == 5:
            raise OSError("no space left on device")
        return quantize(array, kind)

    quantize = gguf.quantize
    monkeypatch.setattr(gguf, "quantize", fail)
    for target in (path, tmp_path / "new" / "b.gguf"):
        seen.clear()
        with pytest.raises(OSError, match="no space left"):
            export_gguf(cfg, params, tok, target)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.gguf"]


def test_what_does_not_fit_is_refused(cfg, params, tok, tmp_path):
    def export(cfg=cfg, params=params, tok=tok, **options):
        export_gguf(cfg, params, tok, tmp_path / "a.gguf", **options)

    with pytest.raises(
        ValueError, match=r"dtype='q4_k' is not supported; use one of float32, .*q8_0"
    ):
        export(dtype="q4_k")
    with pytest.raises(ValueError, match="unknown fields of the model card: nmae"):
        export(card={"nmae": "x"})
    with pytest.raises(ValueError, match=r"bos and eos are 1 and 2, the model's 1 and 7"):
        export(cfg=dataclasses.replace(cfg, eos_token_id=7))
    small = dataclasses.replace(cfg, vocab_size=400)
    with pytest.raises(ValueError, match="the tokenizer has 420 tokens, the model vocab_size=400"):
        export(cfg=small, params=random_tree(small))
    with pytest.raises(ValueError, match="parameters and configuration do not fit; missing: head"):
        export(params={k: v for k, v in params.items() if k != "head"})
    large = params | {"head": params["head"] * 1e5}
    with pytest.raises(ValueError, match="output.weight has weights above 65504"):
        export(params=large)
    user = SentencePieceTokenizer(train_model(user_defined_symbols=["<tool>"]))
    with pytest.raises(ValueError, match="user-defined symbols"):
        export(tok=user)
    assert not list(tmp_path.iterdir())
    export(params=large, dtype="bfloat16")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"general.type": "adapter"}, "general.type=adapter"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type=linear"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 where a head has 10"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.head_count_kv": 3}, "describes no model: .* not a multiple"),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of the kind 't5'; 'llama' .* and 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.add_space_prefix": False}, "no blank before a text"),
        ({"split.count": 3}, "is one of 3 parts; join them first"),
        ({"llama.block_count": 4}, r"missing: blk\.3\.attn_k\.weight, blk\.3\.attn_norm"),
        ({"llama.block_count": 2}, r"extra: blk\.2\.attn_k\.weight"),
        ({"llama.feed_forward_length": 95}, r"shapes: blk\.0\.ffn_down\.weight \(48, 96\) inst"),
    ],
)
def test_odd_metadata_is_named(exported, tmp_path, keys, said):
    with pytest.raises(ValueError, match=said):
        load_gguf(rewritten(exported, tmp_path / "odd.gguf", keys))


def test_odd_tensors_are_all_named_at_once(exported, tmp_path):
    extra = np.zeros((3, 4), np.float32)
    changes = {"blk.0.attn_q.weight": None, "blk.1.attn_q.weight": None, "output_norm.weight": None}
    changes |= {"extra.weight": extra, "blk.1.ffn_up.weight": extra}
    with pytest.raises(ValueError, match="tensors and metadata do not fit") as told:
        load_gguf(rewritten(exported, tmp_path / "odd.gguf", tensors=changes))
    said = str(told.value)
    assert "missing: blk.0.attn_q.weight, blk.1.attn_q.weight, output_norm.weight;" in said
    assert "extra: extra.weight;" in said
    assert "shapes: blk.1.ffn_up.weight (3, 4) instead of (96, 48)" in said
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias"):
        other = rewritten(exported, tmp_path / "odd.gguf", tensors={name: extra[0]})
        with pytest.raises(ValueError, match=f"has what this architecture lacks: {name}"):
            load_gguf(other)
    other = rewritten(
        exported, tmp_path / "odd.gguf", tensors={"output_norm.weight": np.zeros(48, np.int32)}
    )
    with pytest.raises(ValueError, match=r"cannot be read: I32 \(output_norm.weight\)"):
        load_gguf(other)


def test_other_architectures_and_byte_orders_are_refused(exported, tmp_path):
    other = rewritten(exported, tmp_path / "a.gguf", arch="mistral3")
    with pytest.raises(ValueError, match="architecture 'mistral3'; only 'llama' is supported"):
        load_gguf(other)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="big-endian"):
        load_gguf(tmp_path / "b.gguf")


def test_damaged_files_are_one_line(exported, tmp_path):
    whole, path = exported.read_bytes(), tmp_path / "a.gguf"
    for size in (5, 12, 30, 200, 4000, len(whole) // 2, len(whole) - 400):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.gguf is truncated or damaged") as told:
            load_gguf(path)
        assert "\n" not in str(told.value)
    for content, said in (
        (b"", "is no GGUF file"),
        (b"{}" * 50, "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"GGUF" + struct.pack("<I", 99) + bytes(40), "truncated or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_gguf(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_gguf(tmp_path / "none.gguf")


def test_without_the_package_the_way_out_is_said(cfg, params, tok, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zephyr_jax\[gguf\]'"):
        load_gguf(exported)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zephyr_jax\[gguf\]'"):
        export_gguf(cfg, params, tok, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
