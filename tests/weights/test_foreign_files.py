"""What other programs leave out, add or write otherwise, and what must never be lost."""

import json

import numpy as np
import pytest
from conftest import random_params
from gguf_files import random_tree, rewritten, small_config
from sample_tokenizers import train_model

import zephyr_jax as zj
from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.inference.decoding import decode
from zephyr_jax.inference.sampling import SamplingParams

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def model():
    cfg = small_config()
    return cfg, random_tree(cfg), SentencePieceTokenizer(train_model())


def test_absent_keys_are_what_transformers_takes_for_them():
    mistral = MistralConfig.from_hf({"model_type": "mistral", **SIZES})
    llama = MistralConfig.from_hf({"model_type": "llama", **SIZES, "eos_token_id": [7, 8]})
    assert (mistral.rms_norm_eps, llama.rms_norm_eps) == (1e-6, 1e-6)
    assert (mistral.max_position_embeddings, llama.max_position_embeddings) == (131072, 2048)
    assert (mistral.num_key_value_heads, llama.num_key_value_heads) == (8, 8)
    assert (mistral.sliding_window, llama.sliding_window) == (4096, None)
    assert (llama.eos_token_id, mistral.eos_token_id, mistral.head_dim) == (7, 2, 6)
    assert MistralConfig.from_hf({"model_type": "llama", **SIZES, "eos_token_id": []}).eos_token_id


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": "407"},
        {"sliding_window": "16"},
        {"num_hidden_layers": 3.0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"eos_token_id": [1.5]},
    ],
)
def test_config_values_of_another_kind_are_one_line(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MistralConfig.from_hf({"model_type": "mistral", **SIZES, **wrong})


def test_tokens_that_only_tokenizer_json_has_are_not_lost(tmp_path):
    folder = zj.export_hf(*model(), tmp_path / "hf")
    assert isinstance(zj.Tokenizer.from_folder(folder), SentencePieceTokenizer)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    size = len(told["model"]["vocab"])
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    told["added_tokens"].append({"id": size, "content": "<|user|>", "special": True, **extra})
    path.write_text(json.dumps(told))
    tok = zj.Tokenizer.from_folder(folder)
    assert size in tok.encode("a <|user|> b", parse_special=True)


def test_an_import_keeps_what_stands_beside_its_destination(tmp_path):
    folder = zj.export_hf(*model(), tmp_path / "hf")
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "precious").write_text("x")
    zj.save_model(zj.load_model(folder), tmp_path / "new")
    assert (tmp_path / "new.tmp" / "precious").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new", "new.tmp"]


def test_an_export_through_a_link_replaces_what_it_points_to(tmp_path):
    cfg, params, tok = model()
    (tmp_path / "big").mkdir()
    zj.export_hf(cfg, params, tok, tmp_path / "big" / "e")
    (tmp_path / "link").symlink_to(tmp_path / "big" / "e")
    zj.export_hf(cfg, params, tok, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "link"]
    assert [p.name for p in (tmp_path / "big").iterdir()] == ["e"]


def test_a_gguf_of_scaled_positions_is_refused(tmp_path):
    path = zj.export_gguf(*model(), tmp_path / "a.gguf", dtype="float32")
    scaled = rewritten(path, tmp_path / "b.gguf", {"llama.rope.scaling.factor": 4.0})
    with pytest.raises(ValueError, match=r"llama\.rope\.scaling\.factor"):
        zj.load_gguf(scaled)


def test_faults_of_a_file_are_named_together_whatever_the_dtypes(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = zj.export_hf(*model(), tmp_path / "hf", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["position_ids"] = np.arange(4)
    lost = tensors.pop("model.norm.weight")
    assert lost.ndim == 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; extra: position_ids"):
        zj.load_hf(folder)
    save_file(tensors | {"model.norm.weight": lost.astype(np.int64)}, folder / "model.safetensors")
    tensors.pop("position_ids")
    save_file(tensors | {"model.norm.weight": lost.astype(np.int64)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight has dtype I64"):
        zj.load_hf(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ValueError, match="is no safetensors index"):
        zj.load_hf(folder)


def test_no_room_is_kept_for_tokens_without_a_position(cfg):
    params = random_params(cfg)
    new = {}
    for limit in (600, 10**7):  # the model has 512 positions
        chunks = decode(cfg, params, [[5, 6], [7, 8, 9]], SamplingParams(max_new_tokens=limit))
        new[limit] = np.concatenate(list(chunks), axis=1)
    assert new[600].shape == new[10**7].shape == (2, 511)
    np.testing.assert_array_equal(new[600], new[10**7])


def test_the_coldest_draws_are_greedy(cfg):
    params = random_params(cfg)

    def replies(temperature):
        sampling = SamplingParams(max_new_tokens=8, temperature=temperature)
        return np.concatenate(list(decode(cfg, params, [[5, 6, 7]], sampling)), axis=1)

    for temperature in (1e-30, 1e-38, 1e-45, 1e-60):
        np.testing.assert_array_equal(replies(temperature), replies(0.0))
