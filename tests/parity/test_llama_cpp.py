"""GGUF exports in llama.cpp: log-probabilities, tokens and chats of random models."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_params
from llama_server import LlamaServer
from port_files import random_tree
from sample_tokenizers import golden, mistral_tokenizer

import zephyr_jax as zj
from zephyr_jax.weights.gguf import export_gguf

pytestmark = pytest.mark.parity
LENGTHS = (1, 7, 64, 300, 511)
forward = jax.jit(zj.forward, static_argnums=0)


def model_of(tok, **changes):
    """All dimensions unequal, large weights; rows of whole blocks of 32, for q8_0."""
    fields = {"vocab_size": tok.vocab_size, "hidden_size": 96, "intermediate_size": 160}
    fields |= {"head_dim": 20, "initializer_range": 0.2, "sliding_window": 512}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), **fields | changes)
    return cfg, random_params(cfg)


def our_logps(cfg, params, ids):
    """What follows; padded to one length, so that one program serves all."""
    tokens = np.zeros((1, max(LENGTHS)), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(forward(cfg, params, tokens)[0, len(ids) - 1]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 1e6},
        {"num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-2},
    ],
    ids=["grouped", "tied", "ungrouped"],
)
def test_float32_log_probs_are_ours(tok, tmp_path, changes):
    cfg, params = model_of(tok, **changes)
    server = LlamaServer(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32"), 512)
    rng = np.random.default_rng(0)
    for n in LENGTHS:
        ids = [1, *rng.integers(3, cfg.vocab_size, n - 1).tolist()]
        ours, theirs = our_logps(cfg, params, ids), server.logps(ids, cfg.vocab_size)
        assert ours.std() > 0.5  # a real difference would show
        np.testing.assert_allclose(theirs, ours, atol=2e-3, err_msg=f"{n} tokens")


@pytest.mark.parametrize(("dtype", "mean"), [("float16", 0.02), ("bfloat16", 0.15), ("q8_0", 0.35)])
def test_narrow_files_are_near(tok, tmp_path, dtype, mean):
    """llama.cpp rounds activations as it does weights; log-probabilities have a deviation of 2."""
    cfg, params = model_of(tok, head_dim=16)
    server = LlamaServer(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype=dtype), 512)
    rng = np.random.default_rng(1)
    for n in (7, 64, 300):
        ids = [1, *rng.integers(3, cfg.vocab_size, n - 1).tolist()]
        error = np.abs(our_logps(cfg, params, ids) - server.logps(ids, cfg.vocab_size))
        assert mean / 100 < error.mean() < mean


def test_chats_have_our_ids(tmp_path):
    """Also those that spell special tokens; texts are in test_token_ids.py."""
    tok = mistral_tokenizer()
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=tok.vocab_size, hidden_size=8)
    server = LlamaServer(export_gguf(cfg, random_tree(cfg), tok, tmp_path / "a.gguf"))
    for case in golden("chat_cases"):
        chat = (case["messages"], case["add_generation_prompt"])
        assert server.chat_ids(*chat) == zj.render_chat(tok, *chat, parse_special=True)[0]
