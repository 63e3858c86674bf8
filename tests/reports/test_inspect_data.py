"""Looking at data: the mask that is trained on, harmless output, one text in every color."""

import functools
import io
import re

import pytest
from raw_rows import dialogue, messages, rated, write, write_raw

from zephyr_jax.__main__ import main
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import read_split
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.data import record_numbers
from zephyr_jax.reports.inspect import record_cards, row_cards
from zephyr_jax.reports.page import Card, Group, Page, Span, print_cards

TEXTS = ("Where does the mipp live? 😀", "In the dunes.\n</s> is text here.", "Sum 2 and 3.", "5")
TALK = messages(*TEXTS)
EVIL = "<script>alert('x')</script> \x1b[2Jgone\x07 \u202edesrever\u200b &amp; \ud800"


def pair_record(prompt, chosen, rejected) -> dict:
    record: dict = {"prompt": prompt, "prompt_id": "0" * 64, "source": "here"}
    record |= {"chosen": messages(prompt, chosen), "rejected": messages(prompt, rejected)}
    return record | {"score_chosen": 8.0, "score_rejected": 3.5}


def printed(groups, color=False):
    stream = io.StringIO()
    print_cards(groups, stream, color)
    return stream.getvalue()


def without_colors(text):
    return re.sub("\x1b\\[[0-9;]*m", "", text)


@pytest.fixture
def show(capsys):
    """Runs the command; what it wrote to stdout."""

    def run(*words):
        main(["inspect_data", *map(str, words)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(refused):
    return functools.partial(refused, "inspect_data")


def test_nothing_in_the_data_reaches_the_terminal_or_the_page_as_a_command(tmp_path):
    groups = [Group([Card(EVIL, [Span(EVIL, "chosen"), Span("\nnext", "removed")])], parallel=True)]
    text = printed(groups)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[2Jgone\\x07 \\u202edesrever\\u200b" in text
    assert "[-\n│ next-]" in text
    assert without_colors(printed(groups, color=True)) == text
    page = Page(EVIL)
    page.cards(*groups[0])
    page.write(tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search("<script|\x1b", source)
    assert source.count("&lt;script&gt;") == source.count("&amp;amp;") == 4


def test_colors_are_for_terminals(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    groups = [Group([Card("title", [Span("a\nb", "target special")])])]
    assert printed(groups) == "┌ title\n│ a\n│ b\n└\n"
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(groups, color=True)
    assert "\x1b[1;35" in text
    assert without_colors(text) == printed(groups)


def text_of(card, style=""):
    """The text of a card, or of its spans of a style."""
    return "".join(span.text for span in card.spans if style in span.style.split(" ") or not style)


def test_a_dialogue_has_the_mask_that_is_trained_on(tok):
    ids, mask = render_chat(tok, TALK)
    [card] = record_cards({"prompt": "p", "prompt_id": "0", "messages": TALK}, tok)[1].cards
    assert f"{len(ids)} tokens, {sum(mask)} targets" in card.title
    assert [span.style.startswith("target") for span in card.spans] == [bool(m) for m in mask]
    assert text_of(card, "target") == "".join(f"{turn['content']}</s>" for turn in TALK[1::2])
    special = [span.text for span in card.spans if span.style.endswith("special")]
    assert special == ["<s>", *["</s>"] * 4]


def test_a_pair_shows_both_answers(tok):
    _, [[prompt], _], answers = record_cards(pair_record("Where?", "In the dunes.", "No 😀"), tok)
    ids = render_pair(tok, TALK[:1], "In the dunes.", "No 😀")
    assert "Where?" in text_of(prompt, "dim")
    assert answers.parallel
    for side, score, card in zip(("chosen", "rejected"), (8, 3.5), answers.cards, strict=True):
        n = len(getattr(ids, side))
        assert card.title == f"{side}, score {score:g}: {n} tokens, {n} targets"
    assert text_of(answers.cards[1], "rejected") == "No 😀</s>"


def test_a_packed_row_is_shown_by_documents(tok):
    pair = render_pair(tok, TALK[:1], "In the dunes.", "Nowhere")
    first = packing.dialogue_document(*render_chat(tok, TALK), 512)
    packed = [first, packing.pair_document(*pair, 77)]
    groups = row_cards(packing.build_row(packed, 512, 2), tok)
    cards = [card for group in groups for card in group.cards]
    n = len(first.tokens)
    assert [(card.title.split(":")[0], card.style) for card in cards[1:-1]] == [
        ("document 1 from index 0", ""),
        (f"document 2 from index {n}, pair 77, shared prefix", ""),
        ("document 2, chosen", "chosen"),
        ("document 2, rejected", "rejected"),
    ]
    sizes = [len(card.spans) for card in cards[1:-1]]
    assert sizes == [n, len(pair.prompt) - 1, len(pair.chosen) + 1, len(pair.rejected) + 1]
    assert text_of(cards[3]) == "\\nIn the dunes.</s>"
    assert text_of(cards[4], "rejected") == "Nowhere</s>"
    assert cards[-1].title == f"padding: {512 - sum(len(d.tokens) for d in packed)} positions"
    assert "0 documents" in row_cards(packing.build_row([], 8, 2), tok)[0].cards[0].title
    word = next(i for i in range(tok.vocab_size) if re.match(r"▁\w", tok.vocabulary.tokens[i]))
    row = packing.build_row([packing.pair_document([word] * 2, [word], [word] * 2, 5)], 64, 1)
    texts = [text_of(card) for group in row_cards(row, tok) for card in group.cards]
    assert "".join(texts) == tok.decode([word] * 6)  # a branch goes on after its prefix: its blank


def test_margins_and_lengths_of_pairs(tok):
    record = pair_record("Where?", "In the dunes.", "Nowhere")
    numbers = {"length": 19, "prompt": 6, "chosen": 13, "rejected": 7, "score margin": 4.5}
    assert record_numbers(record, None) == numbers
    pair = render_pair(tok, record["chosen"][:1], "In the dunes.", "Nowhere")
    assert record_numbers(record, tok)["length"] == len(pair.prompt) + len(pair.chosen)


def test_raw_rows_and_their_cleaning(show, refused, tmp_path):
    write_raw(tmp_path / "raw")
    source = f"--source={tmp_path / 'raw'}"
    plain = show("raw", "ultrachat", source, "--row=train_1.jsonl.gz:2")
    assert "[-question -]{+Question +}51? " in plain
    assert show("raw", "ultrachat", source, "--row=51") == plain
    assert plain.startswith("train_1.jsonl.gz:2\n")
    assert "rule truecase" in plain
    assert "user, from data[0]" in plain
    kept = show("raw", "ultrachat", source, "--row=51", "--clean", "--data_dir=unused")
    assert "Question" not in kept
    assert show("raw", "ultrachat", source, "--find=QUESTION 51?") == plain
    assert "dropped: truecase, too_long" in show("raw", "ultrachat", source, "--max_chars=20")
    assert "train_1.jsonl.gz hold 80 rows" in refused("raw", "ultrachat", source, "--row=80")
    assert "FILE:LINE" in refused("raw", "ultrachat", source, "--row=x")
    assert "train_0.jsonl" in refused("raw", "ultrachat", source, "--row=other:1")
    assert "no row holds 'zebra'" in refused("raw", "ultrachat", source, "--find=zebra")


def test_rows_that_do_not_fit_and_refusals_and_ratings(show, tmp_path):
    rows = [dialogue(0), {"id": "1", "data": "no"}, {"id": "2", "data": ["Hm?", "As an AI, no."]}]
    source = f"--source={write(tmp_path / 'raw.jsonl', rows)}"
    assert "dropped: wrong_type:data" in show("raw", "ultrachat", source, "--row=1")
    refusal = show("raw", "ultrachat", source, "--row=raw.jsonl:3").splitlines()
    assert {"dropped: refusal", "│ data[1]: As an AI, no."} < set(refusal)
    source = f"--source={write(tmp_path / 'rated.jsonl', [rated(0)])}"
    shown = show("raw", "ultrafeedback", source)
    assert "chosen 5 assistant, from completions[3].response" in shown
    assert "completions[3].response:" not in shown
    assert "completions[0].overall_score: 2.0" in shown


def test_records_of_a_set(show, refused, world, tmp_path):
    chats, pairs = (next((world / "data" / n).glob("*/*")) for n in ("ultrachat", "ultrafeedback"))
    tokenizer = f"--tokenizer={world / 'tokenizer'}"
    shown = show("set", chats, "--row=1", tokenizer)
    assert "\x1b" not in shown
    assert "│ <s>" in shown
    assert "chosen, score" in show("set", pairs, "--split=test_prefs")
    question = read_split(chats, "train_sft")[3]["messages"][0]["content"]
    assert question in show("set", chats, f"--find={question.upper()}").replace("\n│ ", "\n")
    assert "holds 'zebra'" in refused("set", chats, "--find=zebra")
    page = tmp_path / "page.html"
    assert show("set", pairs, tokenizer, f"--html={page}") == ""
    text = page.read_text("utf-8")
    assert all(words in text for words in ("Score margin", "train_prefs", "How the set was made"))
    assert not re.search(r"https?://|<script |<link|<img", text)
    assert "no split 'x'" in refused("set", chats, "--split=x")
    assert "is not a prepared data set" in refused("set", tmp_path)
    assert "give a number" in refused("set", chats, "--row=100000")
    assert "existing folder" in refused("set", chats, f"--html={tmp_path / 'none' / 'x.html'}")


@pytest.mark.parametrize(("recipe", "split"), [("demo_sft", "train"), ("demo_dpo", "eval")])
def test_rows_of_a_packed_set(recipe, split, show, refused, world, tmp_path):
    fields = {"data_dir": world / "data", "tokenizer": world / "tokenizer", "seq_len": 120}
    words = [f"--config.data.{name}={value}" for name, value in fields.items()]
    command = ["packed", f"--config={recipe}", *words]
    refusal = refused(*command)
    assert f"train.py --config={recipe}" in refusal
    assert refusal.endswith("--pack_only")
    packed = build_packed(load_config(recipe, words), Tokenizer.from_folder(world / "tokenizer"))
    shown = show(*command, f"--split={split}")
    first = f"row 0 of {packed.manifest['splits'][split]['rows']}"
    assert all(words in shown for words in (first, "padding: ", "<s>"))
    page = tmp_path / "page.html"
    show(*command, f"--split={split}", f"--html={page}")
    assert "padding share" in page.read_text("utf-8")
    assert "give a number" in refused(*command, "--row=-1")
