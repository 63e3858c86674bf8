"""Looking at data: the mask that is trained on, harmless output, one text in every color."""

import io
import re

import numpy as np
import pytest
from raw_rows import chat, dialogue, rated, write, write_raw
from sample_templates import TEMPLATES, byte_level_files, random_chats

from zephyr_jax.__main__ import COMMANDS, main
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.inspect import spans as faces
from zephyr_jax.reports.inspect.differences import diff_spans, leaves, origins
from zephyr_jax.reports.inspect.packed_rows import documents_of, row_cards
from zephyr_jax.reports.inspect.page import numbers_section, write_page
from zephyr_jax.reports.inspect.spans import Card, Span, cards_html, cards_text, to_ansi, to_html
from zephyr_jax.reports.inspect.statistics import histogram, record_numbers, sampled
from zephyr_jax.reports.inspect.tokens import chat_tokens, pair_tokens, record_cards

TALK = [
    {"role": "user", "content": "Where does the mipp live? 😀"},
    {"role": "assistant", "content": "In the dunes.\n</s> is text here."},
    {"role": "user", "content": "Sum 2 and 3."},
    {"role": "assistant", "content": "5"},
]
NASTY = "<script>alert('x')</script> \x1b[2Jgone\x07 \u202edesrever\u200b &amp; \ud800"
PLAIN = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}


def pair_record(prompt, chosen, rejected):
    asked = {"role": "user", "content": prompt}
    answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
    record = {"prompt": prompt, "prompt_id": "0" * 64, "source": "here"}
    record |= {"chosen": [asked, answers[0]], "rejected": [asked, answers[1]]}
    return record | {"score_chosen": 8.0, "score_rejected": 3.5}


@pytest.fixture
def show(capsys, monkeypatch):
    """Runs the command; what it wrote to stdout."""
    monkeypatch.setitem(COMMANDS, "inspect_data", ("zephyr_jax.cli.inspect_data", "look"))

    def run(*words):
        main(["inspect_data", *map(str, words)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(show, capsys):
    """Runs the command; the one line that it ends with."""

    def run(*words):
        with pytest.raises(SystemExit, match="^2$"):
            show(*words)
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


# Spans and their faces


def test_every_face_shows_the_same_text():
    spans = [Span(NASTY, "target"), Span("\nnext\n", "dim"), Span("", "added"), Span("end", "bold")]
    colored = to_ansi(spans)
    assert "\x1b[32m" in colored
    assert faces.without_colors(colored) == faces.plain(spans)
    assert re.sub("<[^>]*>", "", to_html([Span("a < b", "dim"), Span("c")])) == "a &lt; bc"
    cards = [Card("title", spans, "bold chosen"), Card(NASTY), Card("b", spans, beside=True)]
    assert faces.without_colors(cards_text(cards, True)) == cards_text(cards, False)


def test_nothing_in_the_data_reaches_the_terminal_or_the_page_as_a_command():
    text = cards_text([Card(NASTY, [Span(NASTY)])], False)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[2Jgone\\x07 \\u202edesrever\\u200b" in text
    page = cards_html([Card(NASTY, [Span(NASTY, "chosen")], beside=True)])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&amp;amp;" in page
    assert "\x1b" not in page
    assert page.count("<div") == page.count("</div>")


def test_no_style_goes_on_across_a_line():
    for line in to_ansi([Span("a\nb\n\nc", "target special")]).split("\n"):
        assert line in ("", *(f"\x1b[32;35m{c}\x1b[0m" for c in "abc"))


def test_colors_are_for_terminals():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert faces.wants_colors("auto", Terminal(), {})
    assert not faces.wants_colors("auto", Terminal(), {"NO_COLOR": "1"})
    assert not faces.wants_colors("auto", Terminal(), {"TERM": "dumb"})
    assert not faces.wants_colors("auto", io.StringIO(), {})
    assert faces.wants_colors("always", io.StringIO(), {"NO_COLOR": "1"})
    assert not faces.wants_colors("never", Terminal(), {})
    assert faces.writable("é─", "ascii") == "\\xe9\\u2500"


@pytest.mark.parametrize("seed", range(20))
def test_a_difference_holds_both_texts(seed):
    rng = np.random.default_rng(seed)
    words = np.array(["a ", "B ", "c\n", "  ", "d. "])
    before = "".join(rng.choice(words, 30))
    after = before.title() if seed % 4 == 0 else "".join(rng.choice(words, rng.integers(40)))
    spans = diff_spans(before, after)
    assert "".join(s.text for s in spans if s.style != "added") == before
    assert "".join(s.text for s in spans if s.style != "removed") == after


def test_texts_find_where_they_come_from():
    said = ["hi there you", "yes, i am a b c", "hi there you"]
    found = leaves({"id": 1, "task": "Be brief.", "input": "Oui", "data": said, "talk": "A: b c d"})
    made = ["Hi there you", "yes, I am a b c", "hi there you", "Be brief.\n\nOui", "c d", "no"]
    paths = [[found[i].path for i in at] for at in origins(made, found)]
    assert paths == [["data[0]"], ["data[1]"], ["data[2]"], ["task", "input"], ["talk"], []]


# Records and rows


def test_a_dialogue_has_the_mask_that_is_trained_on(tok):
    ids, mask = render_chat(tok, TALK)
    tokens = chat_tokens(tok, TALK)
    assert [t.id for t in tokens] == ids
    assert [t.target for t in tokens] == [bool(m) for m in mask]
    assert "".join(t.text for t in tokens if t.target) == "".join(
        f"{turn['content']}</s>" for turn in TALK[1::2]
    )
    assert [t.text for t in tokens if t.special] == ["<s>", *["</s>"] * 4]
    record = {"prompt": "p", "prompt_id": "0", "messages": TALK}
    [_, card] = record_cards(record, tok, ids=False)
    assert f"{len(ids)} tokens, {sum(mask)} with loss" in card.title
    shown = [span.text for span in faces.merged(card.spans) if span.style == "target"]
    assert shown == ["In the dunes.\n</s> is text here.", "5"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_tokenizer_with_a_template_of_its_own(kind):
    tok = JsonTokenizer(byte_level_files(kind))
    for messages in random_chats(5, 0, strict=kind == "strict"):
        ids, mask = render_chat(tok, messages)
        tokens = chat_tokens(tok, messages)
        assert ([t.id for t in tokens], [t.target for t in tokens]) == (ids, list(map(bool, mask)))
        assert "".join(t.text for t in tokens if not t.special) == tok.decode(ids)


def test_a_pair_shows_both_answers(tok):
    record = pair_record("Where?", "In the dunes.", "Nowhere 😀")
    prompt, chosen, rejected = pair_tokens(tok, record)
    ids = render_pair(tok, record["chosen"][:1], "In the dunes.", "Nowhere 😀", **PLAIN)
    assert [[t.id for t in part] for part in (prompt, chosen, rejected)] == list(ids)
    assert not any(t.target for t in prompt)
    assert all(t.target for t in chosen + rejected)
    assert "".join(t.text for t in rejected) == "Nowhere 😀</s>"
    cards = record_cards(record, tok, ids=True)
    beside = [card.title.split(":")[0] for card in cards if card.beside]
    assert beside == ["chosen, score 8", "rejected, score 3.5"]
    assert [card.title for card in cards].count("token ids") == 3
    table = faces.plain(cards[-1].spans).splitlines()
    assert table[1].split()[:3] == [str(len(prompt)), str(ids.rejected[0]), "yes"]


def test_a_packed_row_falls_into_its_documents(tok):
    ids, mask = render_chat(tok, TALK)
    pair = render_pair(tok, TALK[:1], "In the dunes.", "Nowhere", **PLAIN)
    first = packing.dialogue_document(ids, mask, 512)
    documents = [first, packing.pair_document(*pair, 77)]
    row = packing.build_row(documents, 512, 2)
    said = documents_of(row, tok)
    assert [d.length for d in said] == [len(d.tokens) for d in documents]
    assert [d.start for d in said] == [0, len(first.tokens)]
    assert [d.id for d in said] == [0, 77]
    assert set(said[0].parts) == {"trunk"}
    trunk, chosen, rejected = (said[1].parts[b] for b in ("trunk", "chosen", "rejected"))
    assert [t.id for t in trunk] == pair.prompt[:-1]
    assert [t.id for t in chosen] == [pair.prompt[-1], *pair.chosen]
    assert [t.target for t in rejected] == [False, *[True] * len(pair.rejected)]
    assert "".join(t.text for t in chosen) == "\nIn the dunes.</s>"
    cards = row_cards(row, tok, ids=False)
    assert [card.style for card in cards if card.beside] == ["bold chosen", "bold rejected"]
    underlined = [s.text for c in cards for s in c.spans if "underlined" in s.style]
    assert "".join(underlined).endswith("5</s>In the dunes.</s>Nowhere</s>")
    padding = 512 - sum(len(d.tokens) for d in documents)
    assert cards[-1].title == f"padding: {padding} places"
    assert "0 documents" in row_cards(packing.build_row([], 8, 2), tok, False)[0].title
    word = next(i for i in range(tok.vocab_size) if re.match(r"▁\w", tok.piece(i)))
    row = packing.build_row([packing.pair_document([word] * 2, [word], [word] * 2, 5)], 64, 1)
    parts = documents_of(row, tok)[0].parts  # a branch goes on from the trunk: its blank stays
    assert "".join(t.text for p in parts.values() for t in p) == tok.decode([word] * 6)


# Numbers


def test_histograms_count_everything_once():
    rng = np.random.default_rng(0)
    for values in (rng.lognormal(5, 1, 3000), rng.integers(0, 9, 100), [0.5], [3, 3, 3], [-2, 4]):
        bins = histogram(list(values))
        assert sum(bin.size for bin in bins) == len(values)
        for bin in bins:
            low = -np.inf if bin.low is None else bin.low
            high = np.inf if bin.high is None else bin.high
            assert bin.size == sum(low <= value < high for value in values)
        assert len(bins) <= 16
    assert histogram([]) == []


def test_large_sets_are_sampled_and_it_is_said():
    assert sampled(200_000, 0, 200_000).indices == range(200_000)
    drawn = sampled(207_865, 0, 230_000)
    assert len(set(drawn.indices)) == 2000
    assert drawn == sampled(207_865, 0, 230_000)
    assert drawn.said == "2,000 of 207,865, drawn with seed 0"
    assert len(sampled(500, 20, 500).indices) == 20
    assert sampled(5, 20, 500).said == "all 5"


def test_margins_and_lengths_of_pairs(tok):
    records = [pair_record("Where?", "In the dunes.", "Nowhere"), pair_record("A", "b", "cd")]
    assert record_numbers(records, None) == {
        "length": [19, 3],
        "prompt": [6, 1],
        "chosen": [13, 1],
        "rejected": [7, 2],
        "margin": [4.5, 4.5],
    }
    numbers = record_numbers(records, tok)
    pair = render_pair(tok, records[0]["chosen"][:1], "In the dunes.", "Nowhere", **PLAIN)
    assert numbers["length"][0] == len(pair.prompt) + len(pair.chosen)
    assert "Score margin" in numbers_section("s", numbers, "tokens", "all 2")
    assert "No score differs" in numbers_section("s", {"margin": [0.0]}, "tokens", "all 1")


# The three commands


def test_raw_rows_and_their_cleaning(show, refused, tmp_path):
    write_raw(tmp_path / "raw")
    source = f"--source={tmp_path / 'raw'}"
    shown = show("raw", "ultrachat", source, "--row=51", "--color=always")
    assert "\x1b[9;31m[-question -]\x1b[0m\x1b[32m{+Question +}\x1b[0m51? " in shown
    plain = show("raw", "ultrachat", source, "--row=train_1.jsonl.gz:2")
    assert plain == faces.without_colors(shown)
    assert plain.startswith("train_1.jsonl.gz:2\n")
    assert "rule truecase" in plain
    kept = show("raw", "ultrachat", source, "--row=51", "--no_truecase", "--data_dir=unused")
    assert "Question" not in kept
    assert show("raw", "ultrachat", source, "--find=QUESTION 51?") == plain
    assert "dropped: too_short" in show("raw", "ultrachat", source, "--min_answer_chars=20")
    assert "no row 80: 2 file(s) hold 80 rows" in refused("raw", "ultrachat", source, "--row=80")
    assert "FILE:LINE" in refused("raw", "ultrachat", source, "--row=x")
    assert "train_0.jsonl" in refused("raw", "ultrachat", source, "--row=other:1")
    assert "holds 'zebra'" in refused("raw", "ultrachat", source, "--find=zebra")


def test_rows_that_do_not_fit_and_refusals(show, tmp_path):
    rows = [dialogue(0), {"id": "1", "data": "no"}, {"id": "2", "data": ["Hm?", "As an AI, no."]}]
    source = f"--source={write(tmp_path / 'raw.jsonl', rows)}"
    assert "dropped: wrong_type:data" in show("raw", "ultrachat", source, "--row=1")
    refusal = show("raw", "ultrachat", source, "--row=raw.jsonl:3").splitlines()
    assert {"dropped: refusal", "│ data[1]: As an AI, no."} < set(refusal)


def test_ratings_become_a_pair(show, tmp_path):
    source = f"--source={write(tmp_path / 'raw.jsonl', [rated(0)])}"
    shown = show("raw", "ultrafeedback", source)
    assert "chosen 5 assistant, from completions[3].response" in shown
    assert "completions[3].response:" not in shown
    assert "completions[0].overall_score: 2.0" in shown


def test_records_of_a_set(show, refused, world, monkeypatch, tmp_path):
    chats, pairs = (next((world / "data" / n).glob("*/*")) for n in ("ultrachat", "ultrafeedback"))
    tokenizer = f"--tokenizer={world / 'tokenizer'}"
    monkeypatch.setenv("NO_COLOR", "1")
    shown = show("set", chats, "--row=1", tokenizer, "--ids")
    assert "\x1b" not in shown
    assert re.search(r"│ +0 +1 +- +<s>\n", shown)
    assert "\x1b[32m" in show("set", chats, "--row=1", tokenizer, "--color=always")
    assert "chosen, score" in show("set", pairs, "--split=test_prefs")
    asked = read_split(chats, "train_sft")[3]["messages"][0]["content"]
    assert asked in show("set", chats, f"--find={asked.upper()}")
    assert "holds 'zebra'" in refused("set", chats, "--find=zebra")
    page = tmp_path / "page.html"
    assert show("set", pairs, tokenizer, f"--html={page}", "--sample=5") == ""
    text = page.read_text("utf-8")
    said = ("Score margin", "drawn with seed 0", "train_prefs", "How the set was made")
    assert all(words in text for words in said)
    assert not re.search(r"https?://|<script|<link|<img", text)
    assert "no split 'x'" in refused("set", chats, "--split=x")
    assert "is not a prepared data set" in refused("set", tmp_path)
    assert "give a number" in refused("set", chats, "--row=100000")
    assert "--tokenizer" in refused("set", chats, "--ids")
    assert "no folder" in refused("set", chats, f"--html={tmp_path / 'none' / 'x.html'}")


@pytest.mark.parametrize(("recipe", "split"), [("demo_sft", "train"), ("demo_dpo", "eval")])
def test_rows_of_a_packed_set(recipe, split, show, refused, world, tmp_path):
    words = [
        f"--config.data.data_dir={world / 'data'}",
        f"--config.data.tokenizer={world / 'tokenizer'}",
        "--config.data.seq_len=120",
    ]
    command = ["packed", f"--config={recipe}", *words]
    assert f"train.py --config={recipe}" in refused(*command)
    tok = Tokenizer.from_folder(world / "tokenizer")
    packed = build_packed(load_config(recipe, words), tok, 2 if recipe == "demo_dpo" else 1)
    shown = show(*command, f"--split={split}", "--color=always")
    first = f"row 0 of {packed.manifest['splits'][split]['rows']}"
    assert all(words in shown for words in (first, "padding: ", "<s>"))
    page = tmp_path / "page.html"
    show(*command, f"--split={split}", f"--html={page}")
    text = page.read_text("utf-8")
    said = ("Fill of the rows", "padding, share of all places", "How the set was made")
    assert all(words in text for words in said)
    assert "give a number" in refused(*command, "--row=-1")
    if recipe == "demo_dpo":
        assert "--pack_for=3" in refused(*command, "--pack_for=3")


def test_a_page_of_a_hostile_set_is_harmless(show, tmp_path):
    rows = [{**chat(n), "prompt": NASTY[:-1] + str(n)} for n in range(20)]
    for row in rows:
        row["messages"] = [{**turn, "content": NASTY[:-1]} for turn in row["messages"]]
    write(tmp_path / "raw.jsonl", rows)
    made = prepare("ultrachat", tmp_path / "raw.jsonl", tmp_path, "200k")
    page = tmp_path / "page.html"
    show("set", made, f"--html={page}")
    assert "<script" not in page.read_text("utf-8")
    assert "\x1b" not in show("set", made)
    write_page(page, NASTY, "")
    assert "<script" not in page.read_text("utf-8")
