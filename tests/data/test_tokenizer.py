"""What both kinds of tokenizer do with text and ids, and the rules of the SentencePiece kind."""

import pickle
import random
import re

import pytest
import sentencepiece
from sample_templates import sample_files, write_chatml
from sample_tokenizers import MISTRAL_SHA256, fuzz_texts, golden, train_model

from zephyr_jax.data.text.json_tokenizer import MASK, JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer

KINDS = ("toy", "mistral", "bytes", "legacy", "first", "always", "symbols", "added")


@pytest.fixture(scope="module", params=KINDS)
def tok(request) -> Tokenizer:
    """A SentencePiece tokenizer, or one of the forms of tokenizer.json."""
    if request.param in KINDS[:2]:
        return request.getfixturevalue(request.param)
    if request.param == "symbols":
        return SentencePieceTokenizer(train_model(user_defined_symbols=["<|user|>", "日本"]))
    if request.param == "added":
        folder = request.getfixturevalue("tmp_path_factory").mktemp("added")
        return Tokenizer.from_folder(write_chatml(folder, ["<|user|>", "日本"]))
    return JsonTokenizer(sample_files("turns", request.param))


def answer_ids(tok: Tokenizer, text: str) -> list[int]:
    """The ids of a text behind a line end."""
    if isinstance(tok, JsonTokenizer):
        masked = tok.special_pattern.sub(lambda found: MASK * len(found[0]), text)
        return tok.encode_rendered(text, masked, behind=True)[0]
    return tok.encode("head\n" + text)[len(tok.encode("head\n")) :]


def test_mistral_ids_equal_the_recorded_ones(mistral):
    assert mistral.digest == MISTRAL_SHA256
    assert (mistral.unk_id, mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (0, 1, 2, 32000)
    for case in golden("tokenizer_cases"):
        assert mistral.encode(case["text"], parse_special=True) == case["ids"], case["text"]


def test_ids_of_words_are_those_of_the_whole_text(mistral):
    crossing = SentencePieceTokenizer(train_model(split_by_whitespace=False))
    both = [token for token in crossing.vocabulary.tokens if re.search("[^▁]▁", token)]
    rng = random.Random(0)
    parts = [" ", "   ", "a", "the", "▁", "\n", "日", "<s>", "x" * 70, "."]
    parts += [token.replace("▁", " ") for token in both[:5]]
    mixed = ["".join(rng.choices(parts, k=rng.randrange(9))) for _ in range(3000)]
    for tok in (mistral, crossing):
        sp = sentencepiece.SentencePieceProcessor(model_proto=tok.files["tokenizer.model"])
        for text in [*mixed, *fuzz_texts(300, seed=3)]:
            assert tok.encode(text) == sp.encode(text), text


def test_specials_in_text_stay_text_unless_asked_for(mistral):
    assert mistral.encode("a</s>b") == [264, 700, 28713, 28767, 28726]
    assert mistral.encode("a</s>b", parse_special=True) == [264, 2, 287]
    for text in fuzz_texts(500, seed=0):
        ids = mistral.encode(text)
        assert not set(ids) & {0, 1, 2}, text
        if not any(special in text for special in mistral.specials):
            assert ids == mistral.encode(text, parse_special=True)


def test_a_newline_is_always_one_token_and_a_cut_point(sp_tok):
    head = sp_tok.encode("head\n")
    for text in fuzz_texts(300, seed=1):
        ids = sp_tok.encode("head\n" + text)
        assert ids.count(head[-1]) == text.count("\n") + 1
        assert ids[: len(head)] == head, text


def test_decode_is_the_inverse_of_encode(tok, request):
    kind = request.node.callspec.params["tok"]
    # Metaspace puts its blank only before a text that has none: one blank is lost for good.
    loses = {"first": "^(\0*) ", "always": "(^|\0) "}.get(kind, "(^$)")
    for text in [*fuzz_texts(200, seed=32), "", " ", "  two", " one", "none", "\n x", "é", " 😀"]:
        text = text.replace("▁", "_").replace("\0", "").replace("\ufffd", "")
        assert tok.decode(tok.encode(text)) == re.sub(loses, r"\1", text)
        bare = tok.special_pattern.sub("\0", text)
        bare = re.sub(loses, r"\1", bare).replace("\0", "")
        legacy = tok.encode(text, parse_special=True)
        assert tok.decode(legacy) == bare, text
        parts = list(tok.stream(legacy, continuation=False))
        assert "".join(parts) == bare
        assert "\ufffd" not in "".join(parts)  # a character comes as a whole
        answer = answer_ids(tok, text)
        assert tok.decode([*answer, tok.eos_id], continuation=True) == text
        assert "".join(tok.stream(answer)) == text
        assert tok.decode([*tok.encode("head\n"), *answer]) == "head\n" + text


def test_a_broken_character_is_decoded_the_same_whole_and_in_parts(tok):
    if tok.vocab_size > 1000:
        pytest.skip("Mistral's vocabulary has these characters as tokens")
    emoji = tok.encode("a😀b")
    assert [part for part in tok.stream(emoji, continuation=False) if part] == ["a", "😀", "b"]
    ids = tok.encode("é😀")[-6:]
    assert len(ids) == 6
    for broken in (ids[:3], ids[:2] + ids[3:5] + ids[:2], ids[1:]):
        assert "".join(tok.stream(broken)) == tok.decode(broken, continuation=True)
    assert tok.decode(ids[:3], continuation=True) == "é\ufffd"


def test_decode_skips_specials_and_what_is_no_id_or_text_is_refused(tok):
    ids = [tok.bos_id, *tok.encode("one"), tok.eos_id, *answer_ids(tok, "\ntwo"), tok.bos_id]
    assert tok.decode(ids) == "one\ntwo"
    with pytest.raises(ValueError, match=r"token id 99999 is not in a vocabulary of \d+"):
        tok.decode([99999])
    with pytest.raises(ValueError, match=r"'\\ud800' in position 1: surrogates not allowed"):
        tok.encode("a\ud800")


def test_pickle_and_files_keep_every_byte(tok, tmp_path):
    path = tok.save(tmp_path / "folder")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == tok.files
    copies = Tokenizer.from_file(path), Tokenizer.from_folder(path.parent)
    for copy in (pickle.loads(pickle.dumps(tok)), *copies):
        assert copy.encode("Hello there </s>") == tok.encode("Hello there </s>")
        assert (type(copy), copy.digest) == (type(tok), tok.digest)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.model and no tokenizer.json;"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a file; name a"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="tokenizer.model: it is damaged, or too new"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_id": -1}, {"eos_id": -1}, {"byte_fallback": False}, {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
        {"model_type": "unigram"}, {"user_defined_symbols": ["a\nb"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_breaks_a_rule_is_refused(changes):
    with pytest.raises(ValueError, match="^x.model: it must be a BPE model with byte_fallback"):
        SentencePieceTokenizer(train_model(**changes), "x.model")
