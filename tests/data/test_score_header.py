"""`chat.score_header`: the header of an answer counts as answer, as in the handbook v0.3.0."""

import dataclasses

import numpy as np
import pytest
from sample_templates import byte_level_files
from sample_tokenizers import fuzz_texts, mistral_tokenizer, train_model

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import pair_id
from zephyr_jax.data.packing.packed import build_packed, packed_digest, packed_folder
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer

HANDBOOK = {"bos": True, "parse_special": True, "append_eos": True, "empty_system": True}
OURS = dict.fromkeys(HANDBOOK, False) | {"bos": True}
HEADER = [28789, 28766, 489, 11143, 28766, 28767, 13]  # <|assistant|> and its newline, mid-text


def asked(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_the_pair_of_the_handbook_has_its_recorded_ids():
    """The ids of the whole chat are the recorded ones; the cut is behind the user's newline."""
    pair = render_pair(
        mistral_tokenizer(), asked("Hi there"), "Hello!", "", **HANDBOOK, score_header=True
    )
    system = [1, 523, 28766, 6574, 28766, 28767, 13, 2]
    user = [28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 23809, 736, 2]
    assert pair.prompt == [*system, *user, 28705, 13]
    assert pair.chosen == [*HEADER, 16230, 28808, 2, 28705, 13, 2]
    assert pair.rejected == [*HEADER, 2, 28705, 13, 2]


@pytest.mark.parametrize("choice", [OURS, HANDBOOK], ids=["ours", "handbook"])
def test_the_header_moves_and_nothing_else(choice):
    texts = fuzz_texts(240, seed=11)
    for tok in (SentencePieceTokenizer(train_model()), mistral_tokenizer()):
        header = render_chat(tok, asked("a"), True)[0][len(render_chat(tok, asked("a"))[0]) :]
        for a, b, c, d, e in zip(*[iter(texts)] * 5, strict=True):
            plain = render_pair(tok, asked(a, b, c), d, e, **choice)
            moved = render_pair(tok, asked(a, b, c), d, e, **choice, score_header=True)
            assert moved.prompt + header == plain.prompt
            assert moved.chosen == header + plain.chosen
            assert moved.rejected == header + plain.rejected
            shown, _ = render_chat(tok, asked(a, b, c), **choice | {"append_eos": False})
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
def test_truncation_counts_the_header_where_it_stands(limits, plain, moved):
    tok, said = mistral_tokenizer(), ("Hello you there , and you !", "Hi")
    sizes = []
    for score_header in (False, True):
        pair = render_pair(tok, asked("Hi there"), *said, **OURS, score_header=score_header)
        sizes.append((pair, packing.cut_pair(*pair, *limits, True)))
    (whole, cut), (whole_moved, cut_moved) = sizes
    assert whole.prompt + whole.chosen == whole_moved.prompt + whole_moved.chosen
    assert tuple(map(len, cut)) == plain
    assert tuple(map(len, cut_moved)) == moved
    assert cut_moved[1][:7] == cut_moved[2][:7] == HEADER


def of_world(world, **chat):
    config = load_config("demo_dpo")
    data = dataclasses.replace(config.data, data_dir=str(world / "data"), seq_len=256)
    dpo = dataclasses.replace(config.dpo, max_length=60, max_prompt_length=24)
    chat = dataclasses.replace(config.chat, **chat)
    return dataclasses.replace(config, data=data, dpo=dpo, chat=chat)


def test_a_packed_set_holds_the_header_in_both_answers(world):
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    config = of_world(world, **HANDBOOK, score_header=True)
    assert packed_digest(config, tok, 1)["chat"]["score_header"] is True
    plain = of_world(world, **HANDBOOK)
    assert packed_folder(config, tok, 1) != packed_folder(plain, tok, 1)
    packed = build_packed(config, tok, 1)
    split = prepare.read_split(
        str(next((world / "data/ultrafeedback/raw").iterdir())), "train_prefs"
    )
    wanted, cut = {}, 0
    for i in range(len(split)):
        turns = split[i]["chosen"]
        said = turns[-1]["content"], split[i]["rejected"][-1]["content"]
        pair = render_pair(tok, turns[:-1], *said, **HANDBOOK, score_header=True)
        parts = packing.cut_pair(*pair, 60, 24, True)
        cut += parts[0] != pair.prompt
        number = pair_id(turns[:-1], *said)
        wanted[number] = packing.pair_document(*parts, number)
    found = 0
    info = packed.manifest["splits"]["train"]
    for row in packed.rows("train").read(range(info["rows"])):
        for k, number in enumerate(row["pair_ids"]):
            here = row["segments"] == k + 1
            if number:
                np.testing.assert_array_equal(row["tokens"][here], wanted[number].tokens)
                np.testing.assert_array_equal(row["loss_mask"][here], wanted[number].loss_mask)
                found += 1
    assert found == info["documents"] > 20
    assert cut


def test_another_template_refuses_it():
    tok = JsonTokenizer(byte_level_files("chatml", n_merges=0))
    with pytest.raises(ValueError, match="score_header belongs to Zephyr's template.*to False"):
        render_pair(tok, asked("x"), "y", "z", **OURS, score_header=True)
