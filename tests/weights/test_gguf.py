"""GGUF files: the tensors by hand and by the package gguf's own table, both ways, metadata."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import assert_same_tree, fields_of, gguf, random_tree, rewritten, small_config
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import make_mesh
from zephyr_jax.weights.gguf import export_gguf, gguf_rules, load_gguf
from zephyr_jax.weights.gguf_io import permute, unpermute
from zephyr_jax.weights.huggingface import hf_tensors


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


def test_rotating_pairs_of_permuted_rows_is_rotating_halves():
    """RoPE in float64, once as pairs of neighbors in complex numbers, once as two halves."""
    rng = np.random.default_rng(0)
    heads, h, d, position, theta = 3, 10, 7, 23, 54321.0
    rows, x = rng.normal(size=(heads * h, d)), rng.normal(size=d)
    angles = position * theta ** (-2 * np.arange(h // 2) / h)
    first, second = np.split((rows @ x).reshape(heads, h), 2, axis=1)
    cos, sin = np.cos(angles), np.sin(angles)
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    neighbors = (permute(rows, h) @ x).reshape(heads, h)
    turned = (neighbors[:, 0::2] + 1j * neighbors[:, 1::2]) * np.exp(1j * angles)
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(heads, h)
    np.testing.assert_allclose(unpermute(pairs.reshape(-1, 1), h)[:, 0], halves.ravel(), atol=1e-12)
    np.testing.assert_array_equal(unpermute(permute(rows, h), h), rows)
    assert not np.array_equal(permute(rows, h), rows)


def test_the_names_are_those_of_llama_cpp(cfg):
    names = {rule.ours.rsplit("/")[-1]: rule.theirs for rule in gguf_rules(cfg)}
    assert names == {
        "embed": "token_embd.weight",
        "attention_norm": "blk.{}.attn_norm.weight",
        "q": "blk.{}.attn_q.weight",
        "k": "blk.{}.attn_k.weight",
        "v": "blk.{}.attn_v.weight",
        "o": "blk.{}.attn_output.weight",
        "mlp_norm": "blk.{}.ffn_norm.weight",
        "gate": "blk.{}.ffn_gate.weight",
        "up": "blk.{}.ffn_up.weight",
        "down": "blk.{}.ffn_down.weight",
        "final_norm": "output_norm.weight",
        "head": "output.weight",
    }


def test_the_tensors_are_those_made_by_hand(cfg, params, exported):
    tensors = {t.name: t for t in gguf.GGUFReader(exported).tensors}
    assert {t.tensor_type.name for t in tensors.values()} == {"F32"}
    attention, h = params["layers"]["attention"], cfg.head_dim
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    for layer in range(cfg.num_hidden_layers):
        q, k = (tensors[f"blk.{layer}.attn_{name}.weight"].data for name in "qk")
        assert q.shape == (cfg.num_attention_heads * h, cfg.hidden_size)
        for head in range(cfg.num_attention_heads):
            for i in range(h):
                ours = attention["q"][layer, :, head // group, head % group, i]
                np.testing.assert_array_equal(q[head * h + (2 * i) % h + (2 * i) // h], ours)
        for head in range(cfg.num_key_value_heads):
            for i in range(h):
                ours = attention["k"][layer, :, head, i]
                np.testing.assert_array_equal(k[head * h + (2 * i) % h + (2 * i) // h], ours)
        o = tensors[f"blk.{layer}.attn_output.weight"].data
        np.testing.assert_array_equal(o, attention["o"][layer].reshape(-1, cfg.hidden_size).T)
        v = tensors[f"blk.{layer}.attn_v.weight"].data
        np.testing.assert_array_equal(v, attention["v"][layer].reshape(cfg.hidden_size, -1).T)
        down = tensors[f"blk.{layer}.ffn_down.weight"].data
        np.testing.assert_array_equal(down, params["layers"]["mlp"]["down"][layer].T)
    np.testing.assert_array_equal(tensors["token_embd.weight"].data, params["embed"])
    np.testing.assert_array_equal(tensors["output.weight"].data, params["head"].T)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "sliding_window": None},
        {"num_key_value_heads": 8, "dtype": "bfloat16"},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    ],
    ids=["grouped", "tied", "ungrouped", "one key head"],
)
def test_a_float32_file_reads_back_bit_for_bit(cfg, tok, tmp_path, changes):
    cfg = dataclasses.replace(cfg, **changes)
    params = random_tree(cfg)
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32")
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert ("output.weight" in names) == (not cfg.tie_word_embeddings)
    got_cfg, got, got_tok = load_gguf(path)
    assert got_cfg == cfg
    assert_same_tree(got, params)
    again = export_gguf(got_cfg, got, got_tok, tmp_path / "again/a.gguf", dtype="float32")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_hold_the_nearest_numbers(cfg, params, tok, tmp_path, dtype):
    _, got, _ = load_gguf(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype=dtype))
    narrow = jnp.dtype(dtype)
    rounded = jax.tree.map(lambda x: x.astype(narrow).astype("float32"), params)
    norms = ("attention_norm", "mlp_norm")
    rounded["layers"] |= {name: params["layers"][name] for name in norms}
    assert_same_tree(got, rounded | {"final_norm": params["final_norm"]})
    _, got, _ = load_gguf(tmp_path / "a.gguf", dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(got)} == {narrow}


def test_q8_0_is_within_half_a_step_of_every_block(tok, tmp_path):
    cfg = dataclasses.replace(
        zj.MistralConfig.tiny(), vocab_size=424, hidden_size=64, intermediate_size=96, head_dim=8
    )
    params = random_tree(cfg)
    _, got, _ = load_gguf(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="q8_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert all(kind == ("F32" if "norm" in name else "Q8_0") for name, kind in kinds.items())
    for (name, ours), (_, theirs) in zip(
        hf_tensors(cfg, params, "float32"), hf_tensors(cfg, got, "float32"), strict=True
    ):
        if ours.ndim == 1:
            np.testing.assert_array_equal(ours, theirs)
            continue
        blocks = ours.reshape(-1, 32)
        # half a step of max/127, and the step itself rounded to float16
        bound = np.abs(blocks).max(1) * (0.5 / 127 + 2**-11) * (1 + 1e-6)
        error = np.abs(theirs.reshape(-1, 32) - blocks).max(1)
        assert (error <= bound).all(), name
        assert error.max() > 0.3 * bound.max()


def test_rows_that_are_no_multiple_of_32_become_float16(cfg, params, tok, tmp_path):
    export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_quantized_files_of_others_are_dequantized(tok, tmp_path, kind):
    cfg = small_config(hidden_size=256, num_hidden_layers=2)
    path = export_gguf(cfg, random_tree(cfg), tok, tmp_path / "a.gguf", dtype="float32")
    name, quant = "blk.1.attn_k.weight", gguf.GGMLQuantizationType[kind]
    # The package cannot make K-quants, but any bytes are some.
    shape = gguf.quant_shape_to_byte_shape((40, 256), quant)
    stored = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rewritten(path, tmp_path / "b.gguf", stored={name: (stored, quant)})
    with np.errstate(invalid="ignore"):  # some scales are no numbers
        got = load_gguf(tmp_path / "b.gguf")[1]["layers"]["attention"]["k"][1]
        wanted = unpermute(gguf.dequantize(stored, quant), cfg.head_dim).reshape(4, 10, 256)
    np.testing.assert_array_equal(got, wanted.transpose(2, 0, 1))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (XLA_FLAGS of conftest)")
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_arrays_are_born_with_their_sharding(cfg, params, tok, exported, tmp_path, sizes):
    with jax.set_mesh(make_mesh(*sizes)):
        _, got, _ = load_gguf(exported)
        assert jax.tree.map(lambda x: x.sharding, got) == param_shardings(cfg)
        assert_same_tree(jax.device_get(got), params)
        again = export_gguf(cfg, got, tok, tmp_path / "model.gguf", dtype="float32")
    assert again.read_bytes() == exported.read_bytes()


def test_the_metadata_is_what_llama_cpp_reads(cfg, params, tok, tmp_path):
    card = {"name": "Zephyr tiny", "license": "mit", "language": ["en"], "summary": "Small."}
    card["lineage"] = ["ported from a/b", "SFT"]
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="bfloat16", card=card)
    found = fields_of(path)
    wanted = {
        "general.architecture": "llama",
        "general.name": "Zephyr tiny",
        "general.license": "mit",
        "general.languages": ["en"],
        "general.description": "Small.",
        "zephyr_jax.lineage": ["ported from a/b", "SFT"],
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 10,
        "llama.attention.value_length": 10,
        "llama.rope.dimension_count": 10,
        "llama.rope.freq_base": 54321.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.vocab_size": 424,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["tokenizer.ggml.tokens"][-4:] == ["[PAD420]", "[PAD421]", "[PAD422]", "[PAD423]"]
    assert found["tokenizer.ggml.token_type"][-5:] == [1, 5, 5, 5, 5]
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


@pytest.mark.parametrize(("window", "context"), [(64, 64), (None, 512), (512, 512), (4096, 512)])
def test_the_context_ends_at_the_window(cfg, params, tok, tmp_path, caplog, window, context):
    cfg = dataclasses.replace(cfg, sliding_window=window)
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf")
    assert fields_of(path)["llama.context_length"] == context
    assert ("context_length is the sliding window, 64, instead of 512" in caplog.text) == (
        window == 64
    )
    # It comes back from our own files alone: llama.cpp knows no window.
    assert load_gguf(path)[0] == cfg
    other = load_gguf(rewritten(path, tmp_path / "b.gguf", {"zephyr_jax.config": None}))[0]
    assert (other.sliding_window, other.max_position_embeddings) == (None, context)


@pytest.mark.parametrize(
    ("folder", "card", "file", "name"),
    [
        ("models/me/zephyr-GGUF", {}, "zephyr-117K-Q8_0.gguf", "zephyr"),
        ("zephyr", {"name": "Zephyr 7B/v2"}, "Zephyr-7B-v2-117K-Q8_0.gguf", "Zephyr 7B/v2"),
        ("zephyr/out.gguf", {}, "out.gguf", "out"),
    ],
)
def test_files_are_named_as_lm_studio_names_them(
    cfg, params, tok, tmp_path, folder, card, file, name
):
    path = export_gguf(cfg, params, tok, tmp_path / folder, dtype="q8_0", card=card)
    wanted = tmp_path / folder
    assert path == (wanted if folder.endswith(".gguf") else wanted / file)
    assert fields_of(path)["general.name"] == name
    assert fields_of(path)["general.size_label"] == "117K"
