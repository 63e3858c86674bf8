"""The JSON kind of tokenizer: text, ids and files. Its chats are in test_own_templates.py."""

import dataclasses
import json
import pickle
import re
import sys

import pytest
from sample_templates import (
    CHATML_NAMES,
    TEMPLATES,
    byte_level_files,
    json_files,
    metaspace_files,
)
from sample_tokenizers import fuzz_texts, train_model

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE, MASK
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.weights.huggingface_files import write_files

pytest.importorskip("tokenizers")
SCHEMES = ("legacy", "first", "always")


@pytest.fixture(scope="module")
def by_bytes() -> JsonTokenizer:
    """Without merges: after the three specials, token 3 + b is byte b."""
    return JsonTokenizer(byte_level_files("chatml", n_merges=0))


@pytest.fixture(scope="module")
def merging() -> JsonTokenizer:
    return JsonTokenizer(byte_level_files("chatml"))


@pytest.fixture(scope="module", params=SCHEMES)
def blank_first(request) -> JsonTokenizer:
    return JsonTokenizer(metaspace_files("turns", request.param))


@pytest.fixture(scope="module")
def toy() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model())


def changed(files: dict[str, bytes], name: str, **changes) -> dict[str, bytes]:
    """The files with fields of one of them replaced; None removes a field."""
    data = json.loads(files.get(name, b"{}")) | changes
    data = {key: value for key, value in data.items() if value is not None}
    return files | {name: json.dumps(data).encode()}


def test_literal_specials_are_text_or_tokens(by_bytes):
    text = "a<|im_end|>é"
    assert by_bytes.encode(text) == [3 + byte for byte in text.encode()]
    assert by_bytes.encode(text, parse_special=True) == [3 + 97, 2, 3 + 0xC3, 3 + 0xA9]
    assert by_bytes.specials == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (by_bytes.bos_id, by_bytes.eos_id, by_bytes.vocab_size) == (1, 2, 259)


def test_the_same_bpe_in_either_form_is_the_same_tokenizer(toy):
    ours = JsonTokenizer(metaspace_files("turns", "legacy"))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (toy.bos_id, toy.eos_id, toy.vocab_size)
    for text in fuzz_texts(150, seed=31):
        for legacy in (False, True):
            ids = toy.encode(text, legacy)
            assert ours.encode(text, legacy) == ids
            for continuation in (False, True):
                assert ours.decode(ids, continuation) == toy.decode(ids, continuation)
                streamed = "".join(ours.stream(ids, continuation))
                assert streamed == toy.decode(ids, continuation)


@pytest.mark.parametrize("kind", ["bytes", *SCHEMES])
def test_decode_is_the_inverse_of_encode(kind, merging):
    tok = merging if kind == "bytes" else JsonTokenizer(metaspace_files("turns", kind))
    # Metaspace puts its blank only before a text that has none: one blank is lost for good.
    loses = {"first": "^(\0*) ", "always": "(^|\0) "}.get(kind, "(^$)")
    for text in fuzz_texts(200, seed=32):
        text = text.replace("▁", "_").replace("\0", "")
        assert tok.decode(tok.encode(text)) == re.sub(loses, r"\1", text)
        bare = tok.special_pattern.sub("\0", text)
        bare = re.sub(loses, r"\1", bare).replace("\0", "")
        legacy = tok.encode(text, parse_special=True)
        assert tok.decode(legacy) == bare, text
        assert "".join(tok.stream(legacy, continuation=False)) == bare
        head = tok.encode("head\n")
        masked = tok.special_pattern.sub(lambda found: MASK * len(found[0]), text)
        answer = tok.encode_rendered(text, masked, continuation=True)[0]
        assert tok.decode(answer, continuation=True) == text
        assert "".join(tok.stream(answer)) == text
        assert tok.decode([*head, *answer]) == "head\n" + text


def test_a_broken_character_is_decoded_alike_whole_and_in_parts(by_bytes, blank_first):
    emoji = by_bytes.encode("a😀b")
    assert [p for p in by_bytes.stream(emoji) if p] == ["a", "😀", "b"]
    for tok in (by_bytes, blank_first):
        ids = tok.encode("é😀")[-6:]
        assert len(ids) == 6
        for broken in (ids[:3], ids[:2] + ids[3:5] + ids[:2], ids[1:]):
            assert "".join(tok.stream(broken)) == tok.decode(broken, continuation=True)
        assert tok.decode(ids[:3], continuation=True) == "é\ufffd"


def test_decode_refuses_what_is_no_id(by_bytes):
    with pytest.raises(ValueError, match="token id 259 is not in a vocabulary of 259"):
        by_bytes.decode([70, 259])
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1; replace"):
        by_bytes.encode("a\ud800")


def test_padding_is_not_the_end_of_a_turn():
    files = byte_level_files("chatml", n_merges=0)

    def pad(**names):
        return JsonTokenizer(changed(files, "tokenizer_config.json", **names)).pad_id

    assert pad() == 0  # pad_token is eos, as in SmolLM2: the unknown token
    assert pad(pad_token="<|im_start|>") == 1
    assert pad(pad_token=None, unk_token=None) == 2
    assert pad(pad_token="not there", unk_token=None) == 2


def test_special_tokens_are_named_in_any_of_the_files():
    files = byte_level_files("chatml", n_merges=0)
    nameless = dict.fromkeys(CHATML_NAMES)
    flags = {"content": "<|im_end|>", "lstrip": False, "special": True}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        bare = changed(files, "tokenizer_config.json", **nameless)
        tok = JsonTokenizer(changed(bare, name, eos_token=flags))
        assert (tok.bos_id, tok.eos_id, tok.tokens["eos_token"]) == (None, 2, "<|im_end|>")
    plain = changed(files, "tokenizer.json", added_tokens=[])  # known to the vocabulary alone
    assert JsonTokenizer(plain).specials == {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 0}
    unmarked = json.loads(files["tokenizer.json"])["added_tokens"]
    unmarked = [token | {"special": False} for token in unmarked]
    tok = JsonTokenizer(changed(files, "tokenizer.json", added_tokens=unmarked))
    assert len(tok.specials) == 3
    assert tok.encode("<|im_end|>") == [3 + byte for byte in b"<|im_end|>"]


def test_the_default_of_several_templates_and_the_file_of_its_own():
    files = byte_level_files("chatml")
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    listed = changed(files, "tokenizer_config.json", chat_template=named)
    assert JsonTokenizer(listed).chat_template == "y"
    assert JsonTokenizer(listed | {"chat_template.jinja": b"z"}).chat_template == "z"
    without = changed(files, "tokenizer_config.json", chat_template=named[:1])
    assert JsonTokenizer(without).chat_template == ""


def test_pickle_and_files_keep_every_byte(merging, tmp_path):
    copy = pickle.loads(pickle.dumps(merging))
    assert copy.encode("Hello there <|im_end|>") == merging.encode("Hello there <|im_end|>")
    extra = {"chat_template.jinja": b"{{ x }}", "special_tokens_map.json": b"{}"}
    tok = JsonTokenizer(merging.files | extra)
    assert tok.digest != merging.digest
    path = tok.save(tmp_path / "folder")
    written = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert written == tok.files
    for again in (Tokenizer.from_file(path), Tokenizer.from_folder(path.parent)):
        assert isinstance(again, JsonTokenizer)
        assert (again.files, again.digest) == (tok.files, tok.digest)


def write_folder(folder, files: dict[str, bytes], model: bytes | None = None):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    return folder


def test_a_folder_gives_the_kind_whose_chats_are_its_own(tmp_path, monkeypatch):
    model, fast = train_model(), metaspace_files("turns", "legacy")
    nothing = changed(fast, "tokenizer_config.json", chat_template=None)
    llama = fast | {"chat_template.jinja": TEMPLATES["stripped"].encode()}
    other_eos = changed(fast, "tokenizer_config.json", eos_token="<unk>")
    cases = {
        "template of Zephyr": (fast, model, SentencePieceTokenizer),
        "our own": (fast | {"chat_template.jinja": CHAT_TEMPLATE.encode()}, model, None),
        "no template": (nothing, model, SentencePieceTokenizer),
        "another template": (llama, model, JsonTokenizer),
        "another end of turn": (other_eos, model, JsonTokenizer),
        "a broken template": (fast | {"chat_template.jinja": b"{% if"}, model, JsonTokenizer),
        "a broken model": (fast, train_model(byte_fallback=False), JsonTokenizer),
        "no model": (fast, None, JsonTokenizer),
        "model alone": ({}, model, SentencePieceTokenizer),
        "template without json": ({"chat_template.jinja": b"x"}, model, SentencePieceTokenizer),
    }
    for name, (files, sp, kind) in cases.items():
        tok = Tokenizer.from_folder(write_folder(tmp_path / name, files, sp))
        assert type(tok) is (kind or SentencePieceTokenizer), name
        assert (tok.chat_template is None) == (type(tok) is SentencePieceTokenizer)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.model and no tokenizer.json;"):
        Tokenizer.from_folder(write_folder(tmp_path / "empty", {}))
    with pytest.raises(ValueError, match="no byte fallback"):
        Tokenizer.from_folder(
            write_folder(tmp_path / "broken", {}, train_model(byte_fallback=False))
        )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer.json": b"version https://git"},
            r"^x: tokenizer.json \(19 bytes\) is not JSON",
        ),
        ({"tokenizer.json": b"[]"}, r"x: tokenizer.json holds a list, not an object"),
        ({"tokenizer.json": b"{}"}, r"^x is not read by the package tokenizers [\d.]+ \('model'\)"),
        ({"tokenizer_config.json": b"{"}, r"x: tokenizer_config.json \(1 bytes\) is not JSON"),
        ({"tokenizer_config.json": b"{}"}, r"x names None as eos_token"),
        (
            {"tokenizer_config.json": b'{"eos_token": "<end>"}'},
            r"x names <end> as eos_token, which is not in its vocabulary; write",
        ),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}'}, "x is not read by the package"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(files, message):
    whole = byte_level_files("chatml", n_merges=0) | files
    with pytest.raises(ValueError, match=message) as error:
        JsonTokenizer(whole, "x")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    files = byte_level_files("chatml", n_merges=0)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        JsonTokenizer(files)


def small_config(**changes) -> MistralConfig:
    return dataclasses.replace(MistralConfig.tiny(), **changes)


def test_an_export_carries_the_files_that_came(merging, tmp_path):
    cfg = small_config(vocab_size=merging.vocab_size + 5, bos_token_id=1, eos_token_id=2)
    write_files(tmp_path, cfg, merging, "float32", {}, "x")
    for name, content in merging.files.items():
        assert (tmp_path / name).read_bytes() == content
    assert not (tmp_path / "tokenizer.model").exists()
    assert not (tmp_path / "chat_template.jinja").exists()  # it is in tokenizer_config.json
    again = Tokenizer.from_folder(tmp_path)
    assert again.digest == merging.digest
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2


def test_an_export_checks_that_the_tokenizer_is_the_models(merging, tmp_path):
    size = merging.vocab_size
    with pytest.raises(ValueError, match="bos 1 and eos 2, the model .*, 1 and 7; export"):
        write_files(
            tmp_path, small_config(vocab_size=size, eos_token_id=7), merging, "float32", {}, "x"
        )
    with pytest.raises(ValueError, match=f"has {size} tokens, .* vocab_size={size - 1},"):
        write_files(tmp_path, small_config(vocab_size=size - 1), merging, "float32", {}, "x")
    # A base model that was trained with the chat version's tokenizer: either token ends a text.
    base = small_config(vocab_size=size, bos_token_id=0, eos_token_id=0)
    write_files(tmp_path, base, merging, "float32", {}, "x")
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["eos_token_id"] == [2, 0]
    nameless = JsonTokenizer(changed(merging.files, "tokenizer_config.json", bos_token=None))
    cfg = small_config(vocab_size=size, bos_token_id=99)
    write_files(tmp_path, cfg, nameless, "float32", {}, "x")


def test_a_unigram_that_makes_specials_of_text_is_refused():
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
    pieces = ["<unk>", "<s>", "</s>", "a", "<", "/", "s", ">"]
    model["vocab"] = [[piece, -float(i)] for i, piece in enumerate(pieces)]
    files = json_files(
        model | {"vocab": {piece: i for i, piece in enumerate(pieces)}},
        TEMPLATES["strict"],
        {"eos_token": "</s>"},
        ["<s>", "</s>"],
    )
    tok = JsonTokenizer(changed(files, "tokenizer.json", model=model))
    assert tok.encode("a</s>a", parse_special=True) == [3, 2, 3]
    with pytest.raises(ValueError, match="makes special tokens of what a user wrote; replace"):
        tok.encode("a</s>a")
