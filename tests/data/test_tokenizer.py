import pickle

import pytest
from sample_tokenizers import MISTRAL_SHA256, fuzz_texts, golden, train_model

from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer


def test_mistral_ids_equal_the_recorded_ones(mistral):
    assert mistral.digest == MISTRAL_SHA256
    assert (mistral.unk_id, mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (0, 1, 2, 32000)
    for case in golden("tokenizer_cases"):
        assert mistral.encode(case["text"], parse_special=True) == case["ids"], case["text"]


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


def test_decode_is_the_inverse_of_encode(sp_tok):
    for text in fuzz_texts(300, seed=2):
        text = text.replace("▁", "_")  # the entry that stands for a blank reads as one
        assert sp_tok.decode(sp_tok.encode(text)) == text
        ids = sp_tok.encode(text, parse_special=True)
        assert sp_tok.decode(ids) == sp_tok.special_pattern.sub("", text), text


def test_decode_of_a_continuation_keeps_its_leading_blank(sp_tok):
    head = sp_tok.encode("head\n")
    for text in ["", " ", "  two", " one", "none", "\n x", "é", " 😀"]:
        answer = sp_tok.encode("head\n" + text)[len(head) :]
        assert sp_tok.decode(answer, continuation=True) == text
        assert sp_tok.decode([*answer, sp_tok.eos_id], continuation=True) == text


def test_decode_skips_specials_and_refuses_unknown_ids(toy):
    ids = [toy.bos_id, *toy.encode("one"), toy.eos_id, *toy.encode("\ntwo"), toy.unk_id]
    assert toy.decode(ids) == "one\ntwo"
    with pytest.raises(ValueError, match="token id 9999 is not in a vocabulary of"):
        toy.decode([9999])


def test_stream_gives_whole_characters_and_joins_to_the_text(sp_tok):
    for text in fuzz_texts(200, seed=3):
        text = text.replace("\ufffd", "").replace("▁", "_")
        parts = list(sp_tok.stream(sp_tok.encode(text), continuation=False))
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)


def test_stream_of_bytes_ends_as_decode_does(toy):
    emoji = toy.encode("a😀b")  # four byte tokens in a vocabulary without emoji
    assert [p for p in toy.stream(emoji, continuation=False) if p] == ["a", "😀", "b"]
    broken = toy.encode("😀")[1:3]
    assert "".join(toy.stream(broken)) == "\ufffd\ufffd"
    broken += toy.encode("x")
    assert "".join(toy.stream(broken)) == toy.decode(broken, continuation=True)


def test_a_lone_surrogate_is_refused_with_the_way_out(toy):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1; replace"):
        toy.encode("a\ud800")


def test_pickle_and_files_keep_every_byte(toy, tmp_path):
    copy = pickle.loads(pickle.dumps(toy))
    assert copy.encode("Hello there") == toy.encode("Hello there")
    path = toy.save(tmp_path / "folder")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]
    for again in (Tokenizer.from_file(path), Tokenizer.from_folder(path.parent)):
        assert (again.model_bytes, again.digest) == (toy.model_bytes, toy.digest)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.model"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a file; name a"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tokenizer.model \(42 bytes\) is not a SentencePiece"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"bos_id": -1}, "no bos"),
        ({"eos_id": -1}, "no eos"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"add_dummy_prefix": False}, "no dummy prefix"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "normalizes text"),
        ({"model_type": "unigram"}, "unigram"),
        ({"user_defined_symbols": ["a\nb"]}, "contains a newline"),
    ],
)
def test_a_model_that_breaks_a_rule_is_refused(changes, rule):
    with pytest.raises(ValueError, match=rule) as error:
        SentencePieceTokenizer(train_model(**changes), "x.model")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("x.model cannot be used: ")
