"""Tokenizers and GGUF files that are damaged at random are read, or refused in one line."""

import copy
import json
import random
import struct

import gguf_files
import port_files
import pytest
from sample_templates import byte_level_files, write_chatml

from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.weights.gguf_reader import load_gguf

tok, cfg, params = port_files.tok, port_files.cfg, port_files.params
exported = gguf_files.exported
SEEDS = 40  # of each kind
ODD = (None, True, -1, 0, 5, 10**30, 1e300, "", "x", "\x00", [], {}, [[]], {"a": 1}, [None], [-1])
CHAT = [{"role": "user", "content": "a</s>b<|im_end|>"}, {"role": "assistant", "content": "c"}]


def refused(read, path) -> bool:
    """Whether `read` raises, which must be one line that begins with the path."""
    try:
        read(path)
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 1000
    return True


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, or with a few of their bits flipped, half of these in the first 400."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(rng.choice([len(content), min(len(content), 400)]))
        flipped[at] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def retyped(content: bytes, rng: random.Random) -> bytes:
    """The JSON with one of its values replaced by another, or removed."""
    inner = data = json.loads(content)
    while True:
        key = rng.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.25:
            break
        inner = inner[key]
    inner[key] = copy.deepcopy(rng.choice(ODD))
    if rng.random() < 0.2:
        del inner[key]
    return json.dumps(data).encode()


def use(folder):
    """What can be read can be used, but for chats that the template refuses."""
    read = Tokenizer.from_folder(folder)
    read.decode(read.encode("Hello  there </s>"))
    try:
        render_chat(read, CHAT)
    except ValueError as error:
        if "\n" in str(error):
            raise


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_a_damaged_tokenizer_is_refused_in_one_line(kind, tmp_path):
    write_chatml(tmp_path, ("<|im_end|>", "<|im_start|>"), ("<|im_end|>",))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if kind == "json":
        files = byte_level_files("chatml")
        (tmp_path / "tokenizer.model").unlink()
    n_refused = 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        name = rng.choice(sorted(files))
        change = retyped if name.endswith(".json") and rng.random() < 0.7 else damaged
        (tmp_path / name).write_bytes(change(files[name], rng))
        n_refused += refused(use, tmp_path)
    assert 5 < n_refused < SEEDS


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_nested_without_end_is_refused(name, tmp_path):
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for file, content in (byte_level_files("chatml") | {name: deep}).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: it is damaged.*recursion"):
        Tokenizer.from_folder(tmp_path)


def test_a_gguf_file_cut_short_is_refused_in_one_line(exported, tmp_path):
    whole, path = exported.read_bytes(), tmp_path / "a.gguf"
    contents = [whole[: len(whole) * n // SEEDS] for n in range(SEEDS)]
    for content in (*contents, b"x" * 100, whole.replace(b"bos_token_id", b"eos_token_id")):
        path.write_bytes(content)
        assert refused(load_gguf, path)


def entry(key, kind, value):
    """A key of a GGUF file."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


HUGE = 10**18
TENSOR = struct.pack("<Q", 1) + b"t"
# Tensors, keys and what follows them.
HEADERS = [
    (HUGE, 0, b""), (0, HUGE, b""), (0, 1, struct.pack("<Q", HUGE)),
    (0, 1, entry(b"a", 8, struct.pack("<Q", 2**63))),
    *((0, 1, entry(b"a", 9, struct.pack("<IQ", kind, HUGE))) for kind in (0, 4, 8, 9)),
    (0, 1, entry(b"a", 9, struct.pack("<IQ", 9, 1) * 100_000)),
    (0, 1, entry(b"a", 77, b"")), (0, 1, entry(b"a", 9, struct.pack("<IQ", 4, 10**6))),
    (1, 0, TENSOR + struct.pack("<I", 2**32 - 1)),
    (1, 0, TENSOR + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("order", "<>")
def test_counts_in_a_gguf_header_are_not_believed(order, tmp_path):
    path = tmp_path / "a.gguf"
    for tensors, keys, rest in HEADERS:
        path.write_bytes(b"GGUF" + struct.pack(f"{order}IQQ", 3, tensors, keys) + rest)
        assert refused(load_gguf, path)


def write_tokenizer(folder, **changes):
    for name, content in byte_level_files("chatml").items():
        (folder / name).write_bytes(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_patterns_that_backtrack_and_huge_ids_are_refused(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    write_tokenizer(tmp_path, pre_tokenizer=split | {"invert": False})
    odd = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer gives a text up: .*retry-limit"):
        odd.encode("a" * 40 + "!")
    write_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    write_tokenizer(tmp_path, model=model | {"vocab": model["vocab"] | {"x" * 9: 4 * 10**9}})
    with pytest.raises(ValueError, match="token id above"):
        Tokenizer.from_folder(tmp_path)
