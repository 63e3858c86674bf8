"""Tokenizers and GGUF files that are damaged at random are read, or refused in one line."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from sample_templates import byte_level_files, write_chatml
from test_properties import any_input, changed, damaged

from zephyr_jax.data import tokenizer_files
from zephyr_jax.data.text import chat
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.weights.gguf_reader import GgufReader, load_gguf
from zephyr_jax.weights.safetensors import SafetensorsReader

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
@any_input
@given(data=st.data())
def test_a_damaged_tokenizer_is_refused_in_one_line(kind, tmp_path_factory, data):
    folder, files = tmp_path_factory.mktemp("tokenizer"), byte_level_files("chatml")
    if kind == "sentencepiece":
        write_chatml(folder, ("<|im_end|>", "<|im_start|>"), ("<|im_end|>",))
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = data.draw(st.sampled_from(sorted(files)))
    other = damaged(files[name])
    if name.endswith(".json"):
        other |= changed(json.loads(files[name])).map(lambda x: json.dumps(x).encode())
    for file, content in (files | {name: data.draw(other)}).items():
        (folder / file).write_bytes(content)
    refused(use, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_nested_without_end_is_refused(name, tmp_path):
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for file, content in (byte_level_files("chatml") | {name: deep}).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: it is damaged.*recursion"):
        Tokenizer.from_folder(tmp_path)


def entry(key, kind, value):
    """A key of a GGUF file."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
GGUF += entry(b"words", 9, struct.pack("<IQQ", 8, 1, 2) + b"bc")
for number, name in enumerate((b"a", b"b")):
    GGUF += struct.pack("<Q", 1) + name + struct.pack("<IQQIQ", 2, 3, 2, 0, 32 * number)
FILES = {
    "a.safetensors": (SafetensorsReader, save({x: np.ones((2, 3), "f") for x in "ab"})),
    "a.gguf": (GgufReader, GGUF + bytes(-len(GGUF) % 32 + 64)),
}


@pytest.mark.parametrize("name", FILES)
@any_input
@given(data=st.data())
def test_a_damaged_file_gives_arrays_of_its_shapes_or_one_error(tmp_path_factory, name, data):
    (kind, content), path = FILES[name], tmp_path_factory.getbasetemp() / name

    def use(path):
        reader = kind(path)
        assert all(reader.read(name).shape == shape for name, shape in reader.shapes.items())
        return reader.shapes

    path.write_bytes(content)
    assert use(path) == {"a": (2, 3), "b": (2, 3)}
    path.write_bytes(data.draw(damaged(content)))
    refused(use, path)


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


TWICE = "{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
NESTED = "{% for a in m.content %}{% for b in m.content %}{% for c in m.content %}"
FOREVER = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 99999999999 }}",
    "folded": "{{ 10 ** (10 ** 10) }}",  # by Jinja when it compiles
    "doubled": "{% set ns = namespace(s='a') %}" + TWICE,
    "long": "{% for m in messages %}" + NESTED + "{% endfor %}" * 4,
    "filter": "{{ lipsum(n=10**9) }}",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FOREVER]


@pytest.mark.parametrize("name", ["ranges", "product", *SLOW[2:]])
def test_a_chat_template_without_end_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "trial", tokenizer_files.trial)
    write_tokenizer(tmp_path)
    render_chat(Tokenizer.from_folder(tmp_path), CHAT)  # its own template ends
    monkeypatch.setattr(tokenizer_files, "TRIAL_SECONDS", 1)
    (tmp_path / "chat_template.jinja").write_text(FOREVER[name])
    with pytest.raises(ValueError, match="chat template cannot be used: it takes more than 1 s"):
        render_chat(Tokenizer.from_folder(tmp_path), CHAT)


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
