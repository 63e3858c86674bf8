"""Ids of the same texts and chats in ours, transformers 4 and 5, and llama.cpp, by our exports.

Texts that spell a special token are compared in test_hf_parity.py.
"""

import pytest
import token_ids

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
