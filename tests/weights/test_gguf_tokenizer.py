"""Tokenizers through GGUF: the same ids, text and chats after an export and an import."""

import dataclasses
import json
from typing import Any

import numpy as np
import port_files
import pytest
import tokenizers
from flax import traverse_util
from gguf_files import fields_of, rewritten
from sample_tokenizers import fuzz_texts, golden, mistral_tokenizer, train_model

import zephyr_jax as zj
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.data.tokenizer_files import tokenizer_json
from zephyr_jax.models.parameters import param_shapes
from zephyr_jax.weights.gguf import LEVEL, PRE_TOKENIZERS, export_gguf
from zephyr_jax.weights.gguf_reader import load_gguf

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Another chat than Zephyr's, whose answers end with `</s>`.
PLAIN = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "</s>")
tok, cfg, params = port_files.tok, port_files.cfg, port_files.params


def assert_same_tokenizer(a, b):
    texts = [case["text"] for case in golden("tokenizer_cases")] + fuzz_texts(300, seed=40)
    texts += [" " * n for n in range(1, 60)]
    for text in texts:
        ids = a.encode(text)
        assert b.encode(text) == ids, text
        assert b.encode(text, parse_special=True) == a.encode(text, parse_special=True), text
        assert b.decode(ids) == a.decode(ids)
    for name in ("bos_id", "eos_id", "pad_id", "vocab_size", "specials", "chat_template"):
        assert getattr(a, name) == getattr(b, name), name
    for case in golden("chat_cases"):
        chat = (case["messages"], case["add_generation_prompt"])
        assert zj.render_chat(a, *chat) == zj.render_chat(b, *chat)


def through_gguf(tok, folder) -> Any:
    """The tokenizer after an export with some model and an import."""
    sizes = {"vocab_size": tok.vocab_size + 3, "hidden_size": 8, "num_hidden_layers": 1}
    ends = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), **sizes, **ends)
    zeros = {k: np.zeros(s, np.float32) for k, s in param_shapes(cfg).items()}
    params = traverse_util.unflatten_dict(zeros, sep="/")
    got_cfg, _, got = load_gguf(export_gguf(cfg, params, tok, folder / "t.gguf"))
    assert got_cfg == cfg
    return got


@pytest.mark.parametrize("which", ["toy", "mistral", "symbols"])
def test_a_sentencepiece_tokenizer_goes_both_ways(which, tok, tmp_path):
    before: Any = tok if which == "toy" else mistral_tokenizer()
    if which == "symbols":
        before = SentencePieceTokenizer(train_model(user_defined_symbols=["<tool>", "<tool>s"]))
        assert before.encode("a<tool>s b", True) == before.encode("a<tool>s b")
    after = through_gguf(before, tmp_path)
    assert isinstance(after, SentencePieceTokenizer)
    assert after.vocabulary == before.vocabulary
    assert_same_tokenizer(before, after)
    if which != "mistral":  # the second export is made of the same tokens
        assert through_gguf(after, tmp_path).digest == after.digest


def test_a_template_that_is_not_zephyrs_stays(cfg, params, tok, tmp_path):
    path = export_gguf(cfg, params, tok, tmp_path / "a.gguf")
    zephyrs = CHAT_TEMPLATE.replace("messages", "messages ")  # another text, the same chats
    for template, kind in ((zephyrs, SentencePieceTokenizer), (PLAIN, JsonTokenizer)):
        other = rewritten(path, tmp_path / "b.gguf", {"tokenizer.chat_template": template})
        cfg, params, got = load_gguf(other)
        assert type(got) is kind
    assert got.chat_template == PLAIN
    back = export_gguf(cfg, params, got, tmp_path / "c.gguf")
    keys = ("tokens", "token_type", "model", "add_space_prefix", "bos_token_id")
    for key in [f"tokenizer.ggml.{key}" for key in keys] + ["tokenizer.chat_template"]:
        assert fields_of(back)[key] == fields_of(other)[key], key
    assert_same_tokenizer(got, load_gguf(back)[2])
    for text in fuzz_texts(200, seed=41):
        assert got.encode(text, parse_special=True) == tok.encode(text, parse_special=True)


def test_a_file_holds_three_end_tokens_and_the_rest_is_said(cfg, params, tok, tmp_path, caplog):
    for ends, written in (((7, 2), (2, 7)), ((9, 2, 7), (2, 9, 7)), ((2, 7, 8, 9), (2, 7, 8))):
        caplog.clear()
        model = dataclasses.replace(cfg, eos_token_id=ends)
        path = export_gguf(model, params, tok, tmp_path / f"{len(ends)}{ends[0]}.gguf")
        assert load_gguf(path)[0].end_ids == written
        assert ("no room for the tokens [9], which end a text" in caplog.text) == (len(ends) > 3)


def byte_level_tokenizer(cut: str, **config) -> JsonTokenizer:
    """A small BPE over bytes that splits text by a rule of `PRE_TOKENIZERS`."""
    steps, ignore_merges = PRE_TOKENIZERS[cut]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    parts |= {"decoder": LEVEL | {"add_prefix_space": True}}
    fast = tokenizers.Tokenizer.from_str(json.dumps(json.loads(fast.to_str()) | parts))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
    )
    lines = [case["text"] for case in golden("tokenizer_cases")] + fuzz_texts(300, seed=42)
    fast.train_from_iterator(lines, trainer)
    fast.add_tokens(["<think>"])
    data = json.loads(fast.to_str())
    if len(steps) == 1:
        data["pre_tokenizer"] = steps[0]
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|end|>"}
    config = names | config
    files = {"tokenizer.json": data, "tokenizer_config.json": config | {"chat_template": CHATML}}
    return JsonTokenizer({name: json.dumps(x).encode() for name, x in files.items()})


@pytest.mark.parametrize("cut", PRE_TOKENIZERS)
def test_a_bpe_tokenizer_goes_both_ways(cut, tmp_path):
    before = byte_level_tokenizer(cut)
    after = through_gguf(before, tmp_path)
    assert isinstance(after, JsonTokenizer)
    assert_same_tokenizer(before, after)
    keys = ("model", "pre", "tokens", "token_type", "add_bos_token", "add_space_prefix")
    fields = fields_of(tmp_path / "t.gguf")
    model, pre, tokens, types, *adds = (fields[f"tokenizer.ggml.{key}"] for key in keys)
    assert (model, pre, adds) == ("gpt2", cut, [False, False])
    kinds = dict(zip(tokens, types, strict=True))
    special = ("<|end|>", "<|im_end|>", "<think>", "a", "[PAD702]")
    assert [kinds[token] for token in special] == [3, 3, 4, 1, 5]
    digits = [after.decode([i]) for i in after.encode("12345678")]
    assert all(len(x) == 1 for x in digits) if cut == "smollm" else max(map(len, digits)) > 1


def test_plain_text_begins_with_bos_where_the_tokenizer_says_so(tmp_path):
    before = byte_level_tokenizer("smollm", add_bos_token=True)
    after = through_gguf(before, tmp_path)
    assert fields_of(tmp_path / "t.gguf")["tokenizer.ggml.add_bos_token"]
    through_gguf(after, tmp_path)
    assert fields_of(tmp_path / "t.gguf")["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize(
    "change", [{"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}}]
)
def test_unknown_pre_tokenizers_are_refused(change, tmp_path):
    tok = byte_level_tokenizer("gpt-2")
    data = json.loads(tok.files["tokenizer.json"]) | change
    odd = JsonTokenizer(tok.files | {"tokenizer.json": json.dumps(data).encode()})
    with pytest.raises(ValueError, match="supported are gpt-2, smollm, llama-bpe"):
        through_gguf(odd, tmp_path)
    assert not list(tmp_path.iterdir())


def test_byte_fallback_that_is_not_sentencepieces_is_refused(tok, tmp_path):
    data = tokenizer_json(tok.vocabulary, "<s>")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    merges = data["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    twice = next(i for i, text in enumerate(made) if made.count(text) > 1)
    apart = merges[:twice] + merges[twice + 1 :] + [merges[twice]]
    for change in (
        {"model": data["model"] | {"merges": apart}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
    ):
        files = {"tokenizer.json": data | change, "tokenizer_config.json": config}
        odd = JsonTokenizer({name: json.dumps(x).encode() for name, x in files.items()})
        with pytest.raises(ValueError, match="GGUF cannot express it|cannot be expressed in GGUF"):
            through_gguf(odd, tmp_path)


@pytest.mark.parametrize("kinds", [(3, 4), (4, 4), (3, 3)], ids=str)
def test_tokens_that_were_added_to_a_sentencepiece_model_go_both_ways(kinds, tok, tmp_path):
    """ChatML fine-tunes as converters write them: a user's token, for some its end token too."""
    size, texts = tok.vocab_size, ["<|im_end|>", "<|im_start|>"]
    cfg = port_files.small_config(vocab_size=size + 2, hidden_size=8, num_hidden_layers=1)
    path = export_gguf(cfg, port_files.random_tree(cfg), tok, tmp_path / "a.gguf")
    fields = fields_of(path)
    keys = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": list(kinds)}
    keys = {k: fields[k][:size] + v for k, v in keys.items()}
    keys |= {"tokenizer.ggml.eos_token_id": size, "tokenizer.chat_template": CHATML}
    got = load_gguf(rewritten(path, tmp_path / "b.gguf", keys))[2]
    assert isinstance(got, JsonTokenizer)
    assert (got.eos_id, got.vocab_size) == (size, size + 2)
    start, end, user = size + 1, size, tok.encode("user\nHi")
    text = "<|im_start|>user\nHi<|im_end|>"
    assert got.encode(text, parse_special=True) == [start, *user, end]
    assert (start in got.encode(text)) == (kinds[1] == 4)  # as in llama.cpp
    assert end not in got.encode(text)
    shown = "" if kinds[1] == 3 else "<|im_start|>"
    assert got.decode([start, *user, end]) == shown + "user\nHi"
    for line in fuzz_texts(200, seed=44):
        assert got.encode(line, parse_special=True) == tok.encode(line, parse_special=True)
    assert_same_tokenizer(got, through_gguf(got, tmp_path))
    assert fields_of(tmp_path / "t.gguf")["tokenizer.ggml.token_type"][size:-3] == [3, kinds[1]]
