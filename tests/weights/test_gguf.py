"""GGUF files: tensors made by hand, both directions, metadata, and the commands."""

import dataclasses
from typing import Any

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import port_files
import pytest
from gguf_files import fields_of, gguf, rewritten, types_of
from port_files import assert_same_tree, random_tree, small_config

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import make_mesh
from zephyr_jax.weights.gguf import export_gguf, permute, unpermute
from zephyr_jax.weights.gguf_reader import load_gguf
from zephyr_jax.weights.huggingface import hf_layout
from zephyr_jax.weights.sources import find_tokenizer, resolve

tok, cfg, params = port_files.tok, port_files.cfg, port_files.params
exported = gguf_files.exported


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


def test_the_tensors_are_those_made_by_hand(cfg, params, exported):
    tensors = {t.name: t.data for t in gguf.GGUFReader(exported).tensors}
    assert set(types_of(exported).values()) == {"F32"}
    attention, h = params["layers"]["attention"], cfg.head_dim
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    for layer in range(cfg.num_hidden_layers):
        q, k = (tensors[f"blk.{layer}.attn_{name}.weight"] for name in "qk")
        assert q.shape == (cfg.num_attention_heads * h, cfg.hidden_size)
        for i in range(h):
            row = (2 * i) % h + (2 * i) // h
            for head in range(cfg.num_attention_heads):
                ours = attention["q"][layer, :, head // group, head % group, i]
                np.testing.assert_array_equal(q[head * h + row], ours)
            for head in range(cfg.num_key_value_heads):
                ours = attention["k"][layer, :, head, i]
                np.testing.assert_array_equal(k[head * h + row], ours)
        o = attention["o"][layer].reshape(-1, cfg.hidden_size).T
        np.testing.assert_array_equal(tensors[f"blk.{layer}.attn_output.weight"], o)
        v = attention["v"][layer].reshape(cfg.hidden_size, -1).T
        np.testing.assert_array_equal(tensors[f"blk.{layer}.attn_v.weight"], v)
        down = params["layers"]["mlp"]["down"][layer].T
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down.weight"], down)
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["embed"])
    np.testing.assert_array_equal(tensors["output.weight"], params["head"].T)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "sliding_window": None},
        {"num_key_value_heads": 8, "dtype": "bfloat16"},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    ],
    ids=["tied", "ungrouped", "one key head"],
)
def test_a_float32_file_reads_back_bit_for_bit(tok, tmp_path, changes):
    cfg = small_config(**changes)
    params = random_tree(cfg)
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32")
    assert ("output.weight" in types_of(path)) == (not cfg.tie_word_embeddings)
    read_cfg, read, read_tok = load_gguf(path)
    assert read_cfg == cfg
    assert_same_tree(read, params)
    again = export_gguf(read_cfg, read, read_tok, tmp_path / "again/a.gguf", dtype="float32")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_hold_the_nearest_numbers(cfg, params, tok, tmp_path, dtype):
    _, read, _ = load_gguf(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype=dtype))
    narrow = jnp.dtype(dtype)
    rounded = jax.tree.map(lambda x: x.astype(narrow).astype("float32"), params)
    norms = ("attention_norm", "mlp_norm")
    rounded["layers"] |= {name: params["layers"][name] for name in norms}
    assert_same_tree(read, rounded | {"final_norm": params["final_norm"]})
    _, read, _ = load_gguf(tmp_path / "a.gguf", dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(read)} == {narrow}


def test_q8_0_is_within_half_a_step_of_every_block(cfg, params, tok, tmp_path):
    kinds = types_of(export_gguf(cfg, params, tok, tmp_path / "odd.gguf", dtype="q8_0"))
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "F16"  # rows of 48 are no multiple of 32
    cfg = small_config(hidden_size=64, head_dim=8)
    params = random_tree(cfg)
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="q8_0")
    _, read, _ = load_gguf(path)
    kinds = types_of(path)
    assert kinds == {name: "F32" if "norm" in name else "Q8_0" for name in kinds}
    for (name, ours), (_, theirs) in zip(
        *(hf_layout(cfg).write(p, "float32") for p in (params, read)), strict=True
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


def test_quantized_files_of_others_are_dequantized(tok, tmp_path):
    cfg = small_config(hidden_size=256, num_hidden_layers=2)
    path = export_gguf(cfg, random_tree(cfg), tok, tmp_path / "a.gguf", dtype="float32")
    name = "blk.1.attn_k.weight"
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"):
        quant = gguf.GGMLQuantizationType[kind]
        # The package cannot make K-quants, but any bytes are some.
        shape = gguf.quant_shape_to_byte_shape((40, 256), quant)
        stored = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        rewritten(path, tmp_path / "b.gguf", stored={name: (stored, quant)})
        with np.errstate(invalid="ignore"):  # some scales are no numbers
            read = load_gguf(tmp_path / "b.gguf")[1]["layers"]["attention"]["k"][1]
            expected = unpermute(gguf.dequantize(stored, quant), cfg.head_dim).reshape(4, 10, 256)
        np.testing.assert_array_equal(read, expected.transpose(2, 0, 1), kind)


def test_arrays_are_created_with_their_sharding(cfg, params, tok, exported, tmp_path):
    with jax.set_mesh(make_mesh(1, 2, 4)):
        _, read, _ = load_gguf(exported)
        assert jax.tree.map(lambda x: x.sharding, read) == param_shardings(cfg)
        assert_same_tree(jax.device_get(read), params)
        again = export_gguf(cfg, read, tok, tmp_path / "model.gguf", dtype="float32")
    assert again.read_bytes() == exported.read_bytes()


def test_the_metadata_is_what_llama_cpp_reads(cfg, params, tok, tmp_path):
    card = {"name": "Zephyr tiny", "license": "mit", "language": ["en"], "lineage": ["a", "SFT"]}
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="bfloat16", card=card)
    fields = fields_of(path)
    expected = {"general.architecture": "llama", "general.name": "Zephyr tiny"}
    expected |= {"general.license": "mit", "general.languages": ["en"], "general.file_type": 32}
    expected |= {"llama.attention.value_length": 10, "llama.rope.dimension_count": 10}
    expected |= {"llama.rope.freq_base": 54321.0, "zephyr_jax.lineage": ["a", "SFT"]}
    tokenizer = {"model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2}
    tokenizer |= {"unknown_token_id": 0, "padding_token_id": 0, "add_bos_token": True}
    tokenizer |= {"add_eos_token": False, "add_space_prefix": True}
    expected |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    expected["tokenizer.chat_template"] = CHAT_TEMPLATE
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert fields["tokenizer.ggml.tokens"][-4:] == ["[PAD420]", "[PAD421]", "[PAD422]", "[PAD423]"]
    assert fields["tokenizer.ggml.token_type"][-5:] == [1, 5, 5, 5, 5]
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


@pytest.mark.parametrize(("window", "context"), [(64, 64), (None, 512), (4096, 512)])
def test_the_context_ends_at_the_window(cfg, params, tok, tmp_path, caplog, window, context):
    cfg = dataclasses.replace(cfg, sliding_window=window)
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf")
    assert fields_of(path)["llama.context_length"] == context
    warned = "context_length is the sliding window, 64" in caplog.text
    assert warned == (window == 64)
    # Only files of ours say more: llama.cpp knows no window.
    assert load_gguf(path)[0] == cfg
    other = load_gguf(rewritten(path, tmp_path / "b.gguf", {"zephyr_jax.config": None}))[0]
    assert (other.sliding_window, other.max_position_embeddings) == (None, context)


@pytest.mark.parametrize(
    ("folder", "card", "file", "name"),
    [
        ("models/me/zephyr-GGUF", {}, "zephyr-117K-F32.gguf", "zephyr"),
        ("zephyr", {"name": "Zephyr 7B/v2"}, "Zephyr-7B-v2-117K-F32.gguf", "Zephyr 7B/v2"),
    ],
)
def test_files_get_the_names_that_lm_studio_expects(
    cfg, params, tok, tmp_path, folder, card, file, name
):
    path = export_gguf(cfg, params, tok, tmp_path / folder, dtype="float32", card=card)
    assert path == tmp_path / folder / file
    assert fields_of(path)["general.name"] == name
    assert fields_of(path)["general.size_label"] == "117K"


def test_a_gguf_file_becomes_a_checkpoint_with_one_command(cfg, params, tok, tmp_path):
    folder = zj.export_hf(cfg, params, tok, tmp_path / "hf")
    file = tmp_path / "a.gguf"
    main(["port_weights", "export", str(folder), str(file), "--format=gguf", "--dtype=float32"])
    assert fields_of(file)["zephyr_jax.lineage"] == [f"ported from {folder}"]
    # A file of another program, which has no key of ours.
    other = rewritten(file, tmp_path / "other.gguf", {"zephyr_jax.config": None})
    main(["port_weights", "import", str(other), str(tmp_path / "checkpoint")])
    read = zj.load_model(tmp_path / "checkpoint")
    assert_same_tree(read.params, params)
    assert read.cfg.sliding_window is None
    assert read.lineage["lineage"] == ["ported from other.gguf"]
    direct: Any = zj.load_model(file)
    assert_same_tree(direct.params, params)
    assert direct.cfg == cfg
    assert direct.tokenizer.vocabulary == tok.vocabulary
    alone = find_tokenizer(resolve(str(file), weights=False))  # as a run's `init` needs it
    assert alone.digest == direct.tokenizer.digest


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


def test_odd_tensors_and_what_is_no_file_are_named(exported, tmp_path):
    def load(**changes):
        load_gguf(rewritten(exported, tmp_path / "odd.gguf", **changes))

    with pytest.raises(ValueError, match="tensors and metadata do not fit; missing: output_norm"):
        load(tensors={"output_norm.weight": None, "extra.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match="type I32 \\(output_norm.weight\\), which cannot be read"):
        load(tensors={"output_norm.weight": np.zeros(48, np.int32)})
    with pytest.raises(ValueError, match="architecture is 'mistral3'; only 'llama' is supported"):
        load(arch="mistral3")
    (tmp_path / "odd.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_gguf(tmp_path / "odd.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_gguf(tmp_path / "none.gguf")
