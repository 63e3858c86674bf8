"""Tokenizers in tokenizer.json, and chats in their own templates, in the installed transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
from sample_templates import FORMS, random_chats, sample_files
from sample_tokenizers import fuzz_texts

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.weights.exports import write_files

transformers = pytest.importorskip("transformers", reason="`make parity` installs transformers")
pytestmark = pytest.mark.parity


def theirs_of(tok: JsonTokenizer, folder: Path):
    """The tokenizer that transformers finds in the folder that we export."""
    cfg = dataclasses.replace(MistralConfig.tiny(), vocab_size=tok.vocab_size)
    write_files(folder, cfg, tok, "float32", {}, "x")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def both(request, tmp_path_factory):
    """The template's name, our tokenizer, and transformers'."""
    kind, form = request.param
    tok = JsonTokenizer(sample_files(kind, form))
    return kind, tok, theirs_of(tok, tmp_path_factory.mktemp("exported"))


def chats(kind, seed):
    """300 chats; the literal specials in them are those of the template."""
    made = random_chats(300, seed, strict=kind == "strict")
    for message in (message for messages in made for message in messages * (kind == "chatml")):
        message["content"] = message["content"].replace("</s>", "<|im_end|>")
    return made


def test_special_tokens_and_vocabulary(both):
    _, ours, theirs = both
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(theirs) == ours.vocab_size  # nothing was added
    assert set(theirs.all_special_ids) == set(ours.specials.values())


def test_ids_of_text(both):
    _, ours, theirs = both
    for text in fuzz_texts(1000, seed=50) + [" " * n for n in range(1, 100)]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids, repr(text)
        kept = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == kept, repr(text)


def test_ids_and_masks_of_chats(both):
    kind, ours, theirs = both
    shifted = 0
    for n, messages in enumerate(chats(kind, 51)):
        prompted = bool(n % 2)
        asked = {"add_generation_prompt": prompted}
        text = theirs.apply_chat_template(messages, tokenize=False, **asked)
        assert text == ours.chat_format.render(messages, prompted)
        asked |= {"return_dict": True, "return_assistant_tokens_mask": True}
        wanted = theirs.apply_chat_template(messages, **asked)
        ids, mask = render_chat(ours, messages, prompted, parse_special=True)
        assert ids == wanted["input_ids"], messages
        for i, (mine, their) in enumerate(zip(mask, wanted["assistant_masks"], strict=True)):
            if mine != their:  # a token that begins in the header: they count it, we do not
                assert (mine, mask[i - 1], mask[i + 1]) == (0, 0, 1), messages
                shifted += 1
        spelled = any(ours.special_pattern.search(m["content"]) for m in messages)
        plain = render_chat(ours, messages, prompted)
        assert (plain == (ids, mask)) == (not spelled), messages
    assert shifted == 0 or (ours.vocab_size < 420 and kind in ("chatml", "turns"))


def test_decoding(both):
    _, ours, theirs = both
    for text in fuzz_texts(300, seed=53):
        ids = ours.encode(text.replace("▁", "_"))
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("form", ["bytes", "legacy", "first"])
def test_the_class_that_a_model_names_changes_nothing(form, named, tmp_path):
    """With model_type llama, transformers 5 would rebuild such a tokenizer, and otherwise."""
    files = sample_files("stripped", form)
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": named}
    config = {key: value for key, value in config.items() if value is not None}
    ours = JsonTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    theirs = theirs_of(ours, tmp_path)
    for text in [*fuzz_texts(500, seed=54), "12345", "  a", "</s> b", "</s>\n x"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids, repr(text)
