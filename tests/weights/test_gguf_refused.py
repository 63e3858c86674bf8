"""What GGUF export and import refuse, and that nothing is left half-written."""

import dataclasses

import gguf_files
import numpy as np
import port_files
import pytest
from gguf_files import rewritten

from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.gguf_reader import load_gguf

tok, cfg, params = port_files.tok, port_files.cfg, port_files.params
exported = gguf_files.exported


def test_what_does_not_fit_is_refused(cfg, params, tok, tmp_path):
    def export(cfg=cfg, params=params, tok=tok, **options):
        export_gguf(cfg, params, tok, tmp_path / "a.gguf", **options)

    large = params | {"head": params["head"] * 1e5}
    for changes, message in (
        ({"dtype": "q4_k"}, r"dtype='q4_k' is not supported; use one of float32, .*q8_0"),
        ({"card": {"nmae": "x"}}, "unknown fields of the model card: nmae"),
        ({"cfg": dataclasses.replace(cfg, eos_token_id=7)}, "has 420 tokens, .* 1 and 7; export"),
        ({"params": {k: v for k, v in params.items() if k != "head"}}, "missing: head"),
        ({"params": large}, "output.weight has weights above 65504"),
    ):
        with pytest.raises(ValueError, match=message):
            export(**changes)
    assert not list(tmp_path.iterdir())
    export(params=large, dtype="bfloat16")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type=linear"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.head_count_kv": 3}, "odd.gguf: .* must be a multiple"),
        ({"tokenizer.ggml.model": "t5"}, "is of the kind 't5'; supported are llama, gpt2"),
        ({"tokenizer.ggml.add_space_prefix": False}, "puts no blank before a text"),
        ({"llama.block_count": 4}, r"missing: blk\.3\.attn_k\.weight, blk\.3\.attn_norm"),
        ({"llama.feed_forward_length": 95}, r"shapes: blk\.0\.ffn_down\.weight \(48, 96\) inst"),
    ],
)
def test_odd_metadata_is_named(exported, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        load_gguf(rewritten(exported, tmp_path / "odd.gguf", keys))


def test_odd_tensors_are_named(exported, tmp_path):
    def load(**changes):
        load_gguf(rewritten(exported, tmp_path / "odd.gguf", **changes))

    with pytest.raises(ValueError, match="tensors and metadata do not fit; missing: output_norm"):
        load(tensors={"output_norm.weight": None, "extra.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match="type I32 \\(output_norm.weight\\), which cannot be read"):
        load(tensors={"output_norm.weight": np.zeros(48, np.int32)})
    with pytest.raises(ValueError, match="architecture is 'mistral3'; only 'llama' is supported"):
        load(arch="mistral3")


def test_what_is_no_file_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_gguf(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_gguf(path)
