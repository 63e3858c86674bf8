"""Ids of the same texts and chats in ours, transformers 4 and 5, and llama.cpp, by our exports.

Texts that spell a special token are compared in test_hf_parity.py.
"""

import dataclasses
import random

import pytest
import token_ids
from sample_templates import write_chatml
from sample_tokenizers import fuzz_texts, mistral_tokenizer

from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.gguf_reader import load_gguf
from zephyr_jax.weights.huggingface import export_hf

tok = token_ids.tok


@pytest.fixture(scope="module")
def cases() -> token_ids.Cases:
    return token_ids.cases()


@pytest.fixture(scope="module")
def ours(tok, cases) -> token_ids.Ids:
    return token_ids.our_ids(tok, cases)


@pytest.mark.parity
def test_transformers_5_gives_our_ids(tok, cases, ours, tmp_path):
    transformers = pytest.importorskip("transformers", reason="make parity installs transformers")
    assert int(transformers.__version__.split(".")[0]) >= 5
    theirs = token_ids.transformers_ids(tok, cases, tmp_path / "hf")
    assert token_ids.differing(cases, ours, theirs) == []


@pytest.mark.slow
def test_transformers_4_gives_our_ids(tok, cases, ours, tmp_path):
    python = token_ids.python_of_transformers_4()
    if not python:
        pytest.skip("no transformers 4.57: make slow installs .venv-hf4, or set ZEPHYR_HF4_PYTHON")
    theirs = token_ids.transformers_ids(tok, cases, tmp_path / "hf", python)
    assert token_ids.differing(cases, ours, theirs) == []


@pytest.mark.parity
def test_llama_cpp_gives_our_ids(tok, cases, ours, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf installs gguf")
    pytest.importorskip("xllamacpp", reason="make parity installs xllamacpp")
    theirs = token_ids.llama_cpp_ids(tok, cases, tmp_path / "model.gguf")
    assert token_ids.differing(cases, ours, theirs) == []


def spelled(tok: Tokenizer) -> list[str]:
    """A thousand texts, half of which spell tokens of this tokenizer and some of others."""
    rng = random.Random(60)
    tokens = [*rng.sample(sorted(tok.specials), min(len(tok.specials), 12)), "[INST]", "<|im_end|>"]
    tokens += ["[REFERENCE_DOC_3]", "[REF]", " [REFERENCE_DOC_13] ", "<|im_start|>", "</s>"]
    atoms = [atom.replace("\0", "") for atom in token_ids.ATOMS]
    mixed = ["".join(rng.choice([*tokens, *atoms]) for _ in range(8)) for _ in range(500)]
    blanks = [" " * n for n in range(1, 400)]
    return [text.replace("\0", "") for text in fuzz_texts(500, seed=61)] + mixed + blanks


@pytest.mark.parity
@pytest.mark.parametrize("which", ["v1", "v2", "v3", "v7", "chatml", "chatml-first"])
def test_a_round_trip_keeps_the_ids_in_transformers_and_llama_cpp(which, tmp_path):
    """Every text with its literal specials as tokens and as text; llama.cpp has no `first`."""
    transformers = pytest.importorskip("transformers", reason="make parity installs transformers")
    pytest.importorskip("xllamacpp", reason="make parity installs xllamacpp")
    from llama_server import LlamaServer

    texts = []
    if which.startswith("v"):
        tok = mistral_tokenizer(which)
    else:
        names = ("<|im_end|>", "<|im_start|>")
        folder = write_chatml(tmp_path / "in", names, names[:1], legacy=which == "chatml")
        (folder / "config.json").write_text('{"model_type": "mistral"}')
        tok = Tokenizer.from_folder(folder)
        original = transformers.AutoTokenizer.from_pretrained(folder)
        texts = spelled(tok)
        theirs = original(texts, add_special_tokens=False)["input_ids"]
        assert [tok.encode(text, parse_special=True) for text in texts] == theirs
    texts = texts or spelled(tok)
    cfg, params = token_ids.model_of(tok)
    cfg = dataclasses.replace(cfg, eos_token_id=tok.eos_id)
    export_hf(cfg, params, tok, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "saved")
    saved = Tokenizer.from_folder(tmp_path / "saved")
    readers = [Tokenizer.from_folder(tmp_path / "hf"), saved]
    server = None
    if which != "chatml-first":
        path = export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32")
        server = LlamaServer(path)
        readers.append(load_gguf(path)[2])
        export_gguf(cfg, params, saved, tmp_path / "b.gguf", dtype="float32")
        readers.append(load_gguf(tmp_path / "b.gguf")[2])
    for text in texts:
        for parsed in (False, True):
            ids = tok.encode(text, parsed)
            asked = {"add_special_tokens": False, "split_special_tokens": not parsed}
            assert theirs(text, **asked)["input_ids"] == ids, repr(text)
            assert [reader.encode(text, parsed) for reader in readers] == [ids] * len(readers)
            assert server is None or server.tokenize(text, parsed) == ids, repr(text)
