"""`chat.score_header`: the header of an answer counts as answer, as in the handbook v0.3.0."""

import pytest
from conftest import with_fields
from sample_tokenizers import fuzz_texts
from test_chat import HEADER, OURS, PUBLISHED, chat
from test_packed import documents_of

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import members
from zephyr_jax.data.packing.packed import build_packed, packed_digest, packed_folder
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.text.chat import render_chat, render_pair

HEADER = HEADER[2:]  # without the newline before it


@pytest.mark.parametrize("choice", [OURS, PUBLISHED], ids=["ours", "handbook"])
def test_the_header_moves_and_nothing_else(sp_tok, choice):
    prompt = render_chat(sp_tok, chat("a"), True)[0]
    header = prompt[len(render_chat(sp_tok, chat("a"))[0]) :]
    for a, b, c, d, e in zip(*[iter(fuzz_texts(240, seed=11))] * 5, strict=True):
        plain = render_pair(sp_tok, chat(a, b, c), d, e, **choice)
        moved = render_pair(sp_tok, chat(a, b, c), d, e, **choice, score_header=True)
        assert moved.prompt + header == plain.prompt
        assert moved.chosen == header + plain.chosen
        assert moved.rejected == header + plain.rejected
        shown, _ = render_chat(sp_tok, chat(a, b, c), **choice | {"append_eos": False})
        assert moved.prompt == shown


@pytest.mark.parametrize(
    ("limits", "plain", "moved"),
    [
        # the longer chat fits: <s>, a question of 11 and a header of 7, an answer of 8
        ((27, 10), (19, 8, 2), (12, 15, 9)),
        # one too long: the prompt keeps 10, counted with the header or without
        ((26, 10), (10, 8, 2), (10, 15, 9)),
        # the prompt is short enough without the header: the answers keep 26 - 12
        ((26, 12), (12, 8, 2), (12, 14, 9)),
        # both are too long with the header in the answers
        ((18, 8), (8, 8, 2), (8, 10, 9)),
    ],
)
def test_truncation_counts_the_header_where_it_stands(mistral, limits, plain, moved):
    answers = ("Hello you there , and you !", "Hi")
    for score_header, sizes in ((False, plain), (True, moved)):
        pair = render_pair(mistral, chat("Hi there"), *answers, **OURS, score_header=score_header)
        cut = packing.cut_pair(*pair, max_length=limits[0], max_prompt_length=limits[1], bos=True)
        assert tuple(map(len, cut)) == sizes
    assert cut[1][:7] == cut[2][:7] == HEADER


def test_a_packed_set_holds_the_header_in_both_answers(world):
    tok, config = zj.Tokenizer.from_folder(world / "tokenizer"), load_config("demo_dpo")
    data = {"data_dir": str(world / "data"), "seq_len": 256}
    lengths = {"max_length": 60, "max_prompt_length": 24}
    plain = with_fields(config, data=data, dpo=lengths, chat=PUBLISHED)
    config = with_fields(plain, chat={"score_header": True})
    assert packed_digest(config, tok)["chat"]["score_header"] is True
    assert packed_folder(config, tok) != packed_folder(plain, tok)
    (member,) = members(config.data)
    expected, cut = set(), 0
    for record in prepare.read_split(member.folder, "train_prefs"):
        turns = record["chosen"]
        answers = turns[-1]["content"], record["rejected"][-1]["content"]
        pair = render_pair(tok, turns[:-1], *answers, **PUBLISHED, score_header=True)
        parts = packing.cut_pair(*pair, 60, 24, True)
        cut += parts[0] != pair.prompt
        document = packing.pair_document(*parts, 0)
        expected.add((tuple(document.tokens), tuple(document.loss_mask)))
    packed = build_packed(config, tok)
    found = {(tuple(t), tuple(mask)) for t, _, mask in documents_of(packed, "train")}
    assert found == expected
    assert len(found) > 20
    assert cut
