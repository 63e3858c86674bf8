"""Ids of the same texts and chats in ours, transformers 4 and 5, and llama.cpp, by our exports.

Texts that spell a special token are compared in test_hf_parity.py.
"""

import dataclasses
import inspect
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from sample_templates import write_chatml
from sample_tokenizers import fuzz_texts, golden, mistral_tokenizer

import zephyr_jax as zj
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.gguf_reader import load_gguf
from zephyr_jax.weights.huggingface import export_hf

SPECIALS = ("<s>", "</s>", "<unk>")
ATOMS = (
    *("the", " and", "Hello", "a", "\n", "\n\n", "\t", "\t\t", "\r\n", " ", "  ", "▁"),
    *("0", "7", "12345", "3.14159", "1e-05", "2026-11-22", "'s", "...", "!!!", "==", "//"),
    *("def f(x):\n    return x", "for (i = 0; i < n; ++i) {", "<div class='a'>", "\\n", "#!"),
    *("<|user|>", "<|assistant|>\n", "<|system|>", "[INST]", "<0x0A>", "<", ">", "</", "s>"),
    *("😀", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "日本語"),
    *("你好\uff0c世界", "한국어", "ไทย", "हिन्दी"),
    *("é", "e\u0301", "a\u0308\u0323", "ﬁ", "Ǆ", "ẞ"),
    *("Привет", "Ελλάδα", "\U0001d518\U0001d52b", "\U0001f9ff"),
    *("عربى", "שלום", "\u202eabc\u202c", "\u200f", "\u200b", "\u2060", "\ufeff", "\u00ad"),
    *("\u3000", "\xa0", "\u2028", "\x00", "\x0b", "\x7f", "\x1b[0m", "\x01", "\ufffd"),
    *("Donaudampfschifffahrtsgesellschaft" * 6, "ab" * 150, "=" * 77, "-" * 300, "na" * 64),
)


@pytest.fixture(scope="module", params=["mistral", "toy"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    """Mistral's tokenizer, and one of 420 tokens."""
    return request.getfixturevalue(request.param)


class Cases(NamedTuple):
    """What is compared; a chat has `messages` and `add_generation_prompt`."""

    texts: list[str]
    chats: list[dict[str, Any]]


class Ids(NamedTuple):
    """The ids of every text, without BOS, and of every chat, with it."""

    texts: list[list[int]]
    chats: list[list[int]]


def cases() -> Cases:
    """A thousand generated texts, chats that deal all of them out, and the golden cases of both."""
    rng = random.Random(30)
    texts = generated_texts(1000, rng)
    left, chats = rng.sample(texts, len(texts)), []
    while left:
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(1, 3)
        contents = [left.pop() for _ in roles[: len(left)]]
        pairs = zip(roles, contents, strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        chats.append({"messages": messages, "add_generation_prompt": rng.random() < 0.5})
    for case in golden("chat_cases"):
        if not any(spells_special(message["content"]) for message in case["messages"]):
            chats.append({key: case[key] for key in ("messages", "add_generation_prompt")})
    recorded = [case["text"] for case in golden("tokenizer_cases")]
    return Cases(texts + [text for text in recorded if not spells_special(text)], chats)


def generated_texts(n: int, rng: random.Random) -> list[str]:
    """Different texts: every run of 1 to 40 blanks in four places, then mixtures of everything."""
    runs, texts = [" " * length for length in range(1, 41)], {}
    for run in runs:
        texts |= dict.fromkeys((run, run + "x", "x" + run, f"if x:\n{run}y{run}z"))

    def atom() -> str:
        if rng.random() < 0.8:
            return rng.choice(ATOMS) if rng.random() < 0.85 else rng.choice(runs)
        low, high = rng.choice([(32, 127), (160, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)])
        return chr(rng.randrange(low, high))

    while len(texts) < n:
        text = "".join(atom() for _ in range(rng.randrange(1, 16)))
        if not spells_special(text):
            texts[text] = None
    return list(texts)


def spells_special(text: str) -> bool:
    """Whether other programs would read a token in what was typed."""
    return any(special in text for special in SPECIALS)


def our_ids(tok: Tokenizer, some: Cases) -> Ids:
    """By `Tokenizer.encode` and `render_chat`."""
    chats = [zj.render_chat(tok, c["messages"], c["add_generation_prompt"])[0] for c in some.chats]
    return Ids([tok.encode(text) for text in some.texts], chats)


def model_of(tok: Tokenizer) -> tuple[zj.MistralConfig, dict[str, Any]]:
    """A model as small as a vocabulary allows."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=tok.vocab_size, **sizes)
    return cfg, zj.init_params(cfg, jax.random.key(0))


def folder_ids(folder, texts, chats):
    """The ids of texts, without BOS, and of chats by the template of a folder; of any Python."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = [
        tokenizer.apply_chat_template(chat.pop("messages"), return_dict=False, **chat)
        for chat in map(dict, chats)
    ]
    return {"texts": tokenizer(texts, add_special_tokens=False)["input_ids"], "chats": rendered}


def transformers_ids(tok: Tokenizer, some: Cases, folder: Path, python=sys.executable) -> Ids:
    """By the transformers of a Python, from an export into `folder`."""
    zj.export_hf(*model_of(tok), tok, folder)
    program = inspect.getsource(folder_ids) + "\nimport json, sys\n"
    program += "json.dump(folder_ids(**json.load(sys.stdin)), sys.stdout)"
    request = json.dumps({"folder": str(folder), **some._asdict()}).encode()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([python, "-c", program], input=request, capture_output=True, env=env)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    return Ids(**json.loads(run.stdout))


def python_of_transformers_4() -> str:
    """The Python with transformers 4.57: ZEPHYR_HF4_PYTHON, or that of .venv-hf4; empty: none."""
    default = Path(__file__).resolve().parents[2] / ".venv-hf4" / "bin" / "python"
    python = os.environ.get("ZEPHYR_HF4_PYTHON") or str(default)
    return python if Path(python).is_file() else ""


def llama_cpp_ids(tok: Tokenizer, some: Cases, path: Path) -> Ids:
    """By llama.cpp's server from a GGUF file at `path`, chats through the template in the file."""
    from llama_server import LlamaServer

    server = LlamaServer(export_gguf(*model_of(tok), tok, path, dtype="float32"))
    chats = [server.chat_ids(c["messages"], c["add_generation_prompt"]) for c in some.chats]
    return Ids([server.tokenize(text, specials=True) for text in some.texts], chats)


def differing(some: Cases, ours: Ids, theirs: Ids) -> list[Any]:
    """The texts and chats whose ids differ."""
    texts = zip(some.texts, ours.texts, theirs.texts, strict=True)
    chats = zip(some.chats, ours.chats, theirs.chats, strict=True)
    return [case for pairs in (texts, chats) for case, a, b in pairs if a != b]


@pytest.fixture(scope="module", name="cases")
def _cases() -> Cases:
    return cases()


@pytest.fixture(scope="module")
def ours(tok, cases) -> Ids:
    return our_ids(tok, cases)


@pytest.mark.parity
def test_transformers_5_gives_our_ids(tok, cases, ours, tmp_path):
    transformers = pytest.importorskip("transformers", reason="make parity installs transformers")
    assert int(transformers.__version__.split(".")[0]) >= 5
    assert differing(cases, ours, transformers_ids(tok, cases, tmp_path / "hf")) == []


@pytest.mark.slow
def test_transformers_4_gives_our_ids(tok, cases, ours, tmp_path):
    python = python_of_transformers_4()
    if not python:
        pytest.skip("no transformers 4.57: make slow installs .venv-hf4, or set ZEPHYR_HF4_PYTHON")
    assert differing(cases, ours, transformers_ids(tok, cases, tmp_path / "hf", python)) == []


@pytest.mark.parity
def test_llama_cpp_gives_our_ids(tok, cases, ours, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf installs gguf")
    pytest.importorskip("xllamacpp", reason="make parity installs xllamacpp")
    assert differing(cases, ours, llama_cpp_ids(tok, cases, tmp_path / "model.gguf")) == []


def spelled(tok: Tokenizer) -> list[str]:
    """A thousand texts, half of which spell tokens of this tokenizer and some of others."""
    rng = random.Random(60)
    tokens = [*rng.sample(sorted(tok.specials), min(len(tok.specials), 12)), "[INST]", "<|im_end|>"]
    tokens += ["[REFERENCE_DOC_3]", "[REF]", " [REFERENCE_DOC_13] ", "<|im_start|>", "</s>"]
    atoms = [atom.replace("\0", "") for atom in ATOMS]
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
    cfg, params = model_of(tok)
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
