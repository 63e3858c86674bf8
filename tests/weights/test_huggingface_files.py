"""The files around exported weights: tokenizer.json gives our ids; the model card."""

import json

import pytest
from sample_tokenizers import fuzz_texts, golden, mistral_tokenizer, train_model

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import render_chat, render_text
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.data.tokenizer_files import Vocabulary, tokenizer_json
from zephyr_jax.weights.exports import CARD_FIELDS, render_card


@pytest.fixture(scope="module", params=["toy", "mistral"])
def generated(request):
    tokenizers = pytest.importorskip("tokenizers")
    toy = request.param == "toy"
    ours = SentencePieceTokenizer(train_model()) if toy else mistral_tokenizer()
    return ours, tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours.vocabulary, "<s>")))


def test_tokenizer_json_gives_our_ids(generated):
    ours, fast = generated
    texts = [c["text"] for c in golden("tokenizer_cases")] + fuzz_texts(3000, seed=10)
    texts += [render_text(c["messages"], c["add_generation_prompt"]) for c in golden("chat_cases")]
    texts += [" " * n for n in range(1, 400)] + ["a" + " " * n + "b" for n in range(1, 400)]
    texts += ["\n" * 5, "\t" * 9, "x" * 500, "=" * 333]
    for text in texts:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text, parse_special=True), repr(text)
    assert fast.encode("Hello").ids == [ours.bos_id, *ours.encode("Hello")]
    assert fast.get_vocab_size() == ours.vocab_size


def test_tokenizer_json_tokenizes_chats_as_render_chat_does(generated):
    ours, fast = generated
    for case in golden("chat_cases"):
        messages, prompted = case["messages"], case["add_generation_prompt"]
        text = "<s>" + render_text(messages, prompted)
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == render_chat(ours, messages, prompted, parse_special=True)[0]


def test_tokenizer_json_decodes_what_it_encoded(generated):
    ours, fast = generated
    for text in fuzz_texts(300, seed=11):
        text = text.replace("▁", "_")
        assert fast.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))


def test_a_tokenizer_that_merges_cannot_express_is_not_exported():
    vocabulary = Vocabulary.of_model(train_model())
    last = vocabulary.tokens.index("".join(vocabulary.merges()[-1]))
    vocabulary.tokens[last] = "never made"
    with pytest.raises(ValueError, match=f"token {last} .'never made'.* is no merge of two others"):
        tokenizer_json(vocabulary, "<s>")


def test_the_card_shows_every_field():
    card = {
        "summary": "A model.",
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "mistralai/Mistral-7B-v0.1",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "tags": ["dpo"],
        "recipe": {"optim": {"peak_lr": 5e-7}},
        "data": {"ultrachat/train": "abc123"},
        "metrics": {"eval/loss": 0.93},
        "lineage": ["mistralai/Mistral-7B-v0.1", "dSFT"],
    }
    assert {*card, "name"} == set(CARD_FIELDS)
    text = render_card(MistralConfig.mistral_7b(), "bfloat16", card, "folder-name")
    _, front, body = text.split("---\n", 2)
    fields = {k: json.loads(v) for k, v in (x.split(": ", 1) for x in front.splitlines())}
    names = ("license", "base_model", "datasets", "language")
    assert {name: fields[name] for name in names} == {name: card[name] for name in names}
    assert fields["tags"] == ["zephyr_jax", "mistral", "dpo"]
    for part in ("# folder-name\n", "A model.", "5e-07", "| ultrachat/train | abc123 |"):
        assert part in body
    for part in ("| eval/loss | 0.93 |", "2. dSFT", "the last 4096 tokens", "bfloat16"):
        assert part in body
    bare = render_card(MistralConfig.tiny(), "float32", {"name": "Zephyr: small"}, "x")
    assert "# Zephyr: small\n" in bare
    assert "license" not in bare
    assert "## Recipe" not in bare
