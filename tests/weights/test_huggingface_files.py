"""The files around exported weights: tokenizer.json gives our ids; the model card."""

import dataclasses
import json

import jax
import pytest
import tokenizers
import yaml
from sample_tokenizers import fuzz_texts, golden, train_model

import zephyr_jax as zj
from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import render_chat, render_text
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.data.tokenizer_files import Vocabulary, tokenizer_json
from zephyr_jax.weights.exports import CARD_FIELDS, write_files


def test_tokenizer_json_gives_our_ids(sp_tok):
    fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(sp_tok.vocabulary, "<s>")))
    texts = [c["text"] for c in golden("tokenizer_cases")] + fuzz_texts(3000, seed=10)
    texts += [" " * n for n in range(1, 400)] + ["a" + " " * n + "b" for n in range(1, 400)]
    texts += ["\n" * 5, "\t" * 9, "x" * 500, "=" * 333]
    for text in texts:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == sp_tok.encode(text, parse_special=True), repr(text)
    for case in golden("chat_cases"):
        chat = case["messages"], case["add_generation_prompt"]
        ids = fast.encode("<s>" + render_text(*chat), add_special_tokens=False).ids
        assert ids == render_chat(sp_tok, *chat, parse_special=True)[0]
    for text in (text.replace("▁", "_") for text in texts[:300] if "</s>" not in text):
        assert fast.decode(sp_tok.encode(text)) == text
    assert fast.encode("Hello").ids == [sp_tok.bos_id, *sp_tok.encode("Hello")]
    assert fast.get_vocab_size() == sp_tok.vocab_size


def test_a_tokenizer_that_merges_cannot_express_is_not_exported():
    vocabulary = Vocabulary.of_model(train_model())
    last = vocabulary.tokens.index("".join(vocabulary.merges()[-1]))
    vocabulary.tokens[last] = "never made"
    with pytest.raises(ValueError, match=f"token {last} .'never made'.* is no merge of two others"):
        tokenizer_json(vocabulary, "<s>")


def card_of(folder, card, name="folder-name", **changes):
    """The front matter and the rest of a model card."""
    cfg = dataclasses.replace(MistralConfig.mistral_7b(), **changes)
    write_files(folder, cfg, SentencePieceTokenizer(train_model()), "bfloat16", card, name)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_shows_every_field(tmp_path):
    base = "mistralai/Mistral-7B-v0.1"
    card = {"summary": "A model.", "license": "apache-2.0", "language": ["en"], "base_model": base}
    card |= {"datasets": ["HuggingFaceH4/ultrachat_200k"], "tags": ["dpo"]}
    card |= {"recipe": {"optim": {"peak_lr": 5e-7}}, "data": {"ultrachat/train": "abc123"}}
    card["metrics"] = {"eval_loss": 0.931234, **{f"eval_source/{i}/loss": 1.0 for i in range(40)}}
    card["lineage"] = [base, "dSFT"]
    assert {*card, "name"} == set(CARD_FIELDS)
    fields, body = card_of(tmp_path, card)
    names = ("license", "base_model", "datasets", "language")
    assert {name: fields[name] for name in names} == {name: card[name] for name in names}
    assert fields["tags"] == ["zephyr_jax", "mistral", "dpo"]
    for part in ("# folder-name\n", "A model.", "5e-07", "| ultrachat/train | abc123 |"):
        assert part in body
    for part in ("| eval_loss | 0.9312 |", "2. dSFT", "the last 4096 tokens", "bfloat16"):
        assert part in body
    assert "eval_source" not in body
    assert json.loads((tmp_path / "metrics.json").read_text()) == card["metrics"]
    assert f"exported by zephyr_jax {zj.__version__} (jax {jax.__version__}, flax " in body
    fields, body = card_of(tmp_path / "bare", {"name": "Zephyr: small"}, sliding_window=None)
    assert "# Zephyr: small\n" in body
    assert fields["license"] == "unknown"
    assert "## Recipe" not in body
    assert not (tmp_path / "bare" / "metrics.json").exists()


@pytest.mark.parametrize(
    "name", ["a: b # c", "x | y", "---\n# two", "`[a](b)` <b>", '"\u2028é😀\x7f']
)
def test_names_that_a_user_gave_break_no_card(name, tmp_path):
    card = {"name": name, "tags": [name], "lineage": [name], "data": {name: name}}
    fields, body = card_of(tmp_path, card | {"recipe": {"name": "```\n" + name}})
    assert " ".join(fields["tags"][-1].split()) == " ".join(name.split())
    assert fields["library_name"] == "transformers"
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == [f"## {x}" for x in ("Use", "Lineage", "Data", "Recipe")]
    rows = [line for line in body.replace("\\|", "").splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {3}
    assert "<b>" not in body.split("## Recipe")[0].replace("\\<b>", "")
    assert body.count("```") == 4
