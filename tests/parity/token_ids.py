"""Texts and chats that spell no special token, and their ids in ours, transformers and llama.cpp.

The others read exports. test_token_ids.py compares, and make_parity_table.py counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from folder_ids import folder_ids
from sample_tokenizers import golden

import zephyr_jax as zj
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.weights.gguf import export_gguf

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


def transformers_ids(tok: Tokenizer, some: Cases, folder: Path, python: str = "") -> Ids:
    """By the installed transformers from an export into `folder`, or by that of another Python."""
    zj.export_hf(*model_of(tok), tok, folder)
    request = {"folder": str(folder), **some._asdict()}
    if not python:
        return Ids(**folder_ids(**request))
    program = [python, str(Path(__file__).with_name("folder_ids.py"))]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(program, input=json.dumps(request).encode(), capture_output=True, env=env)
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
