"""The JSON kind of tokenizer: text, ids and files. Its chats are in test_own_templates.py."""

import dataclasses
import json
from typing import Any

import pytest
from sample_templates import (
    CHATML_NAMES,
    TEMPLATES,
    byte_level_files,
    changed,
    json_files,
    metaspace_files,
    write_chatml,
)
from sample_tokenizers import fuzz_texts, train_model

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import CHAT_TEMPLATE, render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.weights.exports import write_files


@pytest.fixture(scope="module")
def by_bytes() -> JsonTokenizer:
    """Without merges: after the three specials, token 3 + b is byte b."""
    return JsonTokenizer(byte_level_files("chatml", n_merges=0))


def configured(files: dict[str, bytes], **names) -> JsonTokenizer:
    """The tokenizer with fields of tokenizer_config.json replaced; None removes a field."""
    return JsonTokenizer(changed(files, "tokenizer_config.json", **names))


def test_literal_specials_are_text_or_tokens(by_bytes):
    text = "a<|im_end|>é"
    assert by_bytes.encode(text) == [3 + byte for byte in text.encode()]
    assert by_bytes.encode(text, parse_special=True) == [3 + 97, 2, 3 + 0xC3, 3 + 0xA9]
    assert by_bytes.specials == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (by_bytes.bos_id, by_bytes.eos_id, by_bytes.vocab_size) == (1, 2, 259)


def test_padding_is_not_the_end_of_a_turn(by_bytes):
    files = by_bytes.files
    assert by_bytes.pad_id == 0  # pad_token is eos, as in SmolLM2: the unknown token
    assert configured(files, pad_token="<|im_start|>").pad_id == 1
    assert configured(files, pad_token=None, unk_token=None).pad_id == 2
    assert configured(files, pad_token="not there", unk_token=None).pad_id == 2


def test_special_tokens_are_named_in_any_of_the_files(by_bytes):
    files = by_bytes.files
    bare = changed(files, "tokenizer_config.json", **dict.fromkeys(CHATML_NAMES))
    eos = {"content": "<|im_end|>", "lstrip": False, "special": True}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        tok = JsonTokenizer(changed(bare, name, eos_token=eos))
        assert (tok.bos_id, tok.eos_id, tok.tokens["eos_token"]) == (None, 2, "<|im_end|>")
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    for tokens in ([], [token | {"special": False} for token in added]):
        tok = JsonTokenizer(changed(files, "tokenizer.json", added_tokens=tokens))
        assert tok.specials.items() == by_bytes.specials.items()
        assert tok.encode("<|im_end|>") == [3 + byte for byte in b"<|im_end|>"]


def test_the_default_of_several_templates_and_the_file_of_its_own(by_bytes):
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    listed = configured(by_bytes.files, chat_template=named)
    assert listed.chat_template == "y"
    with_file = JsonTokenizer(listed.files | {"chat_template.jinja": b"z"})
    assert with_file.chat_template == "z"
    assert with_file.digest != listed.digest
    assert configured(by_bytes.files, chat_template=named[:1]).chat_template == ""


def test_a_folder_gives_the_kind_whose_chats_are_its_own(tmp_path):
    def read(files: dict[str, bytes]) -> Tokenizer:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return Tokenizer.from_folder(folder)

    def template(text: str) -> dict[str, bytes]:
        return {"chat_template.jinja": text.encode()}

    model = {"tokenizer.model": train_model()}
    broken = {"tokenizer.model": train_model(byte_fallback=False)}
    fast = metaspace_files("turns", "legacy")
    bare = changed(fast, "tokenizer_config.json", chat_template=None)
    for files in (fast, fast | template(CHAT_TEMPLATE), bare, {}):
        assert isinstance(read(files | model), SentencePieceTokenizer), files
    for files in (
        fast,
        fast | broken,
        fast | model | template(TEMPLATES["stripped"]),
        fast | model | template("{% if"),
        model | template("of its own"),
        changed(fast | model, "tokenizer_config.json", eos_token="<unk>"),
    ):
        assert isinstance(read(files), JsonTokenizer), files
    with pytest.raises(ValueError, match="it must be a BPE model with byte_fallback"):
        read(broken)


@pytest.mark.parametrize("name", ["None", "<end>"])
def test_an_end_token_that_is_not_there_is_named(by_bytes, name):
    with pytest.raises(ValueError, match=f"it names {name} as eos_token, which is not in its"):
        configured(by_bytes.files, eos_token=None if name == "None" else name)


def test_an_export_carries_the_files_that_came(by_bytes, tmp_path):
    cfg = dataclasses.replace(MistralConfig.tiny(), vocab_size=by_bytes.vocab_size + 5)
    write_files(tmp_path, cfg, by_bytes, "float32", {}, "x")
    for name, content in by_bytes.files.items():
        assert (tmp_path / name).read_bytes() == content
    assert not (tmp_path / "tokenizer.model").exists()
    assert not (tmp_path / "chat_template.jinja").exists()  # it is in tokenizer_config.json
    assert Tokenizer.from_folder(tmp_path).digest == by_bytes.digest
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # A base model that was trained with the chat version's tokenizer: either token ends a text.
    cfg = dataclasses.replace(cfg, bos_token_id=0, eos_token_id=0)
    write_files(tmp_path, cfg, by_bytes, "float32", {}, "x")
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 0]
    cfg = dataclasses.replace(cfg, eos_token_id=7)
    with pytest.raises(ValueError, match="bos 1 and eos 2, the model .*, 0 and 7; export"):
        write_files(tmp_path, cfg, by_bytes, "float32", {}, "x")


ADDED = ("<|im_end|>", "<|im_start|>")  # ids 420 and 421


def behind(toy: Tokenizer, text: str) -> list[int]:
    """The ids of a text without a dummy prefix: nothing merges across the line end before it."""
    return toy.encode("\n" + text)[2:]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("listed", ["decoder", "added_tokens.json"])
def test_tokens_that_were_added_to_a_model_are_read(toy, tmp_path, listed, legacy):  # pitfall 48
    changes = {} if listed == "decoder" else {"added_tokens_decoder": None}
    folder = write_chatml(tmp_path / "x", ADDED, ADDED[:1], legacy=legacy, **changes)
    tok = Tokenizer.from_folder(folder)
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (1, 420, 422)
    assert tok.specials.keys() & ADDED == {*ADDED[:1]}
    inner = behind if legacy is False else SentencePieceTokenizer.encode
    end = inner(toy, "\n")
    chat = [{"role": "user", "content": "Hello  there"}]
    text = "<|im_start|>user\nHello  there<|im_end|>\n"
    ids = [421, *inner(toy, "user\nHello  there"), 420, *end]
    assert tok.encode(text, parse_special=True) == ids
    assert tok.encode("<|im_start|>user") == [421, *inner(toy, "user")]  # no special token
    assert 420 not in tok.encode("a<|im_end|>")
    assert render_chat(tok, chat, True)[0][-3:] == [421, *inner(toy, "assistant\n")][-3:]
    for line in fuzz_texts(100, seed=60):
        if legacy is not False:
            assert tok.encode(line, parse_special=True) == toy.encode(line, parse_special=True)
    tok.save(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert (again.digest, again.encode(text, True)) == (tok.digest, ids)


def test_what_the_files_of_a_model_name_is_read_as_transformers_does(toy, tmp_path):
    def read(**changes) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        names = changes.pop("names", {})
        folder = write_chatml(folder, ADDED, changes.pop("special", ADDED[:1]), **changes)
        if names:
            (folder / "special_tokens_map.json").write_text(json.dumps(names))
        return Tokenizer.from_folder(folder)

    swapped = {"eos_token": "</s>", "bos_token": {"content": "<s>", "lstrip": False}}
    assert read(names=swapped).eos_id == 420  # the map counts where no decoder is listed
    assert read(names=swapped, added_tokens_decoder=None).eos_id == 2
    assert read(pad_token="</s>").pad_id == 2
    assert read(additional_special_tokens=["<|im_start|>"]).specials.keys() >= {*ADDED}
    flags = {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "special": True}
    stripped = read(added_tokens_decoder={"420": flags, "424": {"content": "<|im_start|>"}})
    ids = [*toy.encode("a"), 420, *toy.encode("b")]
    assert stripped.encode("a <|im_end|> b", parse_special=True) == ids
    assert stripped.encode("<|im_start|>")[-1] == 424  # an id keeps its gap
    assert stripped.vocab_size == 425
    renamed = read(added_tokens_decoder={"5": {"content": "<|im_end|>", "special": True}})
    assert renamed.encode("<|im_end|>", parse_special=True) == [5]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"7": {"content": "<s>"}}, "the id 7 of the added token '<s>' is not its alone"),
        ({"-1": {"content": "<e>"}}, "the id -1 of the added token '<e>'"),
        ({"420": "<e>"}, "it is damaged, or too new"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, listed, message):
    folder = write_chatml(tmp_path, ADDED, added_tokens_decoder=listed)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)


def test_a_unigram_that_makes_specials_of_text_is_refused():
    texts = ["<unk>", "<s>", "</s>", "a", "<", "/", "s", ">"]
    model = {"vocab": {text: i for i, text in enumerate(texts)}}
    files = json_files(model, TEMPLATES["strict"], {"eos_token": "</s>"}, ["<s>", "</s>"])
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
    model["vocab"] = [[text, -float(i)] for i, text in enumerate(texts)]
    tok = JsonTokenizer(changed(files, "tokenizer.json", model=model))
    assert tok.encode("a</s>a", parse_special=True) == [3, 2, 3]
    with pytest.raises(ValueError, match="makes special tokens of what a user wrote; replace"):
        tok.encode("a</s>a")
