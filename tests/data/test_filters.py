import doctest
import gzip
import json
import random
import re
import unicodedata
import zlib
from importlib import metadata

import numpy as np
import pytest
from raw_rows import messages, system, write

from zephyr_jax.data.raw import filters
from zephyr_jax.data.raw.filters import contamination, load_contaminants, signature, words

LONG = "Name fifteen rivers of the far north, then say which one of them freezes last of all."
CODE = 'def has_close(numbers: List[float], limit: float) -> bool:\n    """ Check whether any two'
CODE += ' numbers are closer to each other than the limit. """\n'


def chat(*contents):
    return {"prompt": contents[0], "prompt_id": "0", "messages": messages(*contents)}


def pair(prompt, chosen, rejected):
    answers = {"chosen": messages(prompt, chosen), "rejected": messages(prompt, rejected)}
    return {"prompt": prompt, **answers}


@pytest.fixture
def banned(tmp_path):
    asked = [{"question_id": 81, "turns": [LONG, "Now draw a map."]}, {"turns": ["Hi!"]}]
    tasks = [{"task_id": "HumanEval/0", "prompt": CODE, "entry_point": "has_close"}]
    paths = [write(tmp_path / "question.jsonl", asked)]
    paths += [write(tmp_path / "HumanEval.jsonl.gz", tasks), tmp_path / "alpaca_eval.json"]
    rows = [{"instruction": "Où est le café de la gare ?", "output": "x", "dataset": "own"}]
    paths[-1].write_text(json.dumps(rows, indent=1))
    return load_contaminants(paths)


def test_what_is_contaminated(banned):
    thirteen = " ".join(words(LONG)[3:16])
    for message in (
        f"Please: {LONG.upper()}!",
        f"so {thirteen} maybe",
        thirteen.replace(" ", " -\n"),
        "NOW   draw_a map",
        CODE.replace("    ", "\t").replace('"""', "'''"),
        "où est le CAFE\u0301 de la gare",
    ):
        assert contamination(chat("Is it?", f"Yes. {message}"), banned), message
        assert contamination(chat("é " + message, "No."), banned)
        published = pair("Is it?", "No.", message) | chat("Is it?", "No.")
        assert contamination(published, banned)[2] == "rejected[1] (assistant)"
        assert contamination({"messages": [system(message), *messages("a")]}, banned)


def test_what_is_not(banned):
    twelve = words(LONG)[3:15]
    for record in (
        chat(" ".join(twelve), words(LONG)[15]),  # the run goes on in the next message
        chat(" ".join(twelve[:6]) + " x " + " ".join(twelve[6:]), "Yes."),
        chat("Now draw a", "map"),
        chat("Hi there", "Hi!"),  # a short prompt counts as a turn of the user only
        chat("", ""),
    ):
        assert not contamination(record, banned), record
    assert contamination(chat("é", "Yes.", "HI…", "Yes?"), banned)
    assert not contamination(chat(LONG, "Yes."), load_contaminants([]))


def test_the_example_names_file_words_and_place(banned):
    record = chat("é?", "A.", "and " + LONG[5:], "C.")
    shared = " ".join(words(LONG)[1:14])
    assert contamination(record, banned) == ["question.jsonl", shared, "messages[2] (user)"]
    file, shared, place = contamination(pair("Is it?", "No.", CODE), banned)
    assert (file, place) == ("HumanEval.jsonl.gz", "rejected[1] (assistant)")
    assert shared == " ".join(words(CODE)[:13])
    assert contamination(pair("hi", "No.", "-"), banned)[1:] == ["hi", "chosen[0] (user)"]


def plain_words(text):
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def naive(record, prompts):
    """The rule once more, word by word."""
    for turn in record["messages"]:
        text = plain_words(turn["content"])
        for prompt in map(plain_words, prompts):
            if len(prompt) < 4:
                if turn["role"] == "user" and prompt == text:
                    return True
                continue
            size = min(13, len(prompt))
            runs = {tuple(prompt[at : at + size]) for at in range(len(prompt) - size + 1)}
            if any(tuple(text[at : at + size]) in runs for at in range(len(text) - size + 1)):
                return True
    return False


def test_random_texts_agree_with_the_rule_word_by_word():
    rng = random.Random(13)
    seen = {True: 0, False: 0}

    def text(alphabet, stops):
        drawn = (rng.choice(alphabet) + rng.choice(stops) for _ in range(rng.randint(1, 16)))
        return "".join(drawn)

    for _ in range(300):
        alphabet = ["a", "B", "c_c", "é", "ÿ", "ﬁ", "中文", "\x80"][: rng.choice([3, 5, 8])]
        stops = [" ", ", ", "\n", "…", "_"][: rng.choice([2, 5])]
        prompts = tuple(text(alphabet, stops) + " a" for _ in range(2))
        record = chat(*(text(alphabet, stops) for _ in range(4)))
        wanted = naive(record, prompts)
        banned = (filters.PromptFile("a.jsonl", "0", prompts),)
        assert bool(contamination(record, banned)) is wanted, (prompts, record)
        seen[wanted] += 1
    assert min(seen.values()) >= 10


def test_words_of_ascii_are_those_of_the_general_rule():
    assert doctest.testmod(filters).failed == 0
    text = "".join(map(chr, range(128)))
    assert words(text) == plain_words(text)


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        ({"max_chars": 31}, "too_long"),
        ({"max_chars": 32, "min_answer_chars": 3, "max_turns": 4}, None),
        ({"min_answer_chars": 4}, "too_short_answer"),
        ({"max_turns": 3}, "too_many_turns"),
    ],
)
def test_limits_are_those_of_each_dialogue(limits, fault):
    record = chat("Hello there?", " Hi. ", "And now?", "Good.")
    record["messages"].insert(0, system("be"))
    harmless = messages("Hello?", "Fine.")
    assert filters.length_fault(record, **limits) == fault
    for sides in (("chosen", "rejected"), ("rejected", "chosen")):
        two = dict(zip(sides, (record["messages"], harmless), strict=True))
        assert filters.length_fault(two, **limits) == fault


@pytest.mark.parametrize("ngram", [4, 9, 40])
def test_the_number_of_shared_words_can_be_set(banned, ngram):
    run = words(LONG)[2 : 2 + ngram] if ngram < 18 else words(LONG)
    assert contamination(chat("é", " ".join(run)), banned, ngram)[1] == " ".join(run)
    assert not contamination(chat("é", " ".join(run[1:])), banned, ngram)


def test_shapes_of_prompt_files(tmp_path):
    lines = write(tmp_path / "lines.jsonl", [{"question": "How far?"}, {"turns": ["a b", "c d"]}])
    listed = tmp_path / "listed.json"
    listed.write_text('\ufeff[\n{"prompt": "x"},\n{"instruction": "y", "text": "not this"}]\n')
    plain = tmp_path / "plain.txt.gz"
    plain.write_bytes(gzip.compress(b"How much?\n\n Since when? \n"))
    loaded = load_contaminants([listed, str(lines), plain])
    assert {file.name: file.prompts for file in loaded} == {
        "lines.jsonl": ("How far?", "a b", "c d"),
        "listed.json": ("x", "y"),
        "plain.txt.gz": ("How much?", " Since when? "),
    }
    assert load_contaminants([plain, lines, listed]) == loaded


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "x"},\n{"prompt": }]', r"a\.json, line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"answer": 1}\n', r"row 3: .*not {'answer': 1}"),
        ("a.json", b"[]", r"a\.json holds no prompt"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}', mtime=0)[:-9], r"\.gz is damaged"),
        ("a.csv", b"x", r"a\.csv must be"),
    ],
)
def test_prompt_files_that_do_not_fit(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_contaminants([tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"No such file .*nowhere\.jsonl"):
        load_contaminants([tmp_path / "nowhere.jsonl"])


WORDS = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "al", "un")]


def families(seed, count):
    """Texts of which many are changed copies of earlier ones, in chains."""
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        parts = rng.choices(WORDS, k=rng.randint(1, 80))
        if texts and rng.random() < 0.6:
            parts = rng.choice(texts[-60:]).split()
            for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
                parts[rng.randrange(len(parts))] = rng.choice(WORDS)
        texts.append(" ".join(parts))
    return texts


def brute_force(signatures):
    """Compares every prompt with every kept one before it."""
    digests = np.array([sketch.digest() for sketch in signatures])
    repeated = np.full(len(digests), -1, np.int64)
    for row in range(len(digests)):
        kept = np.flatnonzero(repeated[:row] < 0)
        similar = (digests[kept] == digests[row]).mean(axis=1) >= 0.8
        if similar.any():
            repeated[row] = kept[np.argmax(similar)]
    return repeated


def test_prompts_are_dropped_greedily_in_their_order_as_by_brute_force():
    signatures = [signature(text) for text in families(1, 600)]
    for order in (np.arange(600), np.random.default_rng(0).permutation(600)):
        ordered = [signatures[at] for at in order]
        expected = brute_force(ordered)
        assert 60 < np.count_nonzero(expected >= 0) < 540
        np.testing.assert_array_equal(filters.near_duplicates(ordered), expected)
    assert filters.near_duplicates([]).shape == (0,)


def test_a_signature_sees_words_only():
    one = signature("How  do I, please, CLEAN my car?")
    for text in ("how do i please clean my car", "how do i please clean my\u2026car"):
        assert one.digest() == signature(text).digest()
    texts = ["", "???", "!", "hi", "hi there", "there hi", "a b c d e", "a b c d", "中文"]
    assert (filters.near_duplicates([signature(text) for text in texts]) == -1).all()
    assert signature("").digest() == signature(" \n").digest()


def test_signatures_of_this_version_are_known():
    """Signatures decide which rows stay, so reports name the version that computed them."""
    assert filters.METHOD.startswith(f"rensa {metadata.version('rensa')}")
    digests = [signature(text).digest() for text in ("", "so be it", "é " * 9)]
    sums = [zlib.crc32(np.array(digest, np.uint32).tobytes()) for digest in digests]
    assert sums == [491254263, 2544225162, 3804926432]


def test_prompts_of_a_crowd_are_not_compared_to_later_ones(monkeypatch):
    monkeypatch.setattr(filters, "_CROWD", 50)
    template, end = " ".join(WORDS[:14]), " ".join(WORDS[20:26])
    prompts = [f"{template} {n} {end} {n} end" for n in range(300)]
    repeated = filters.near_duplicates([signature(prompts[n]) for n in (*range(300), 3, 250)])
    assert np.flatnonzero(repeated >= 0).tolist() == [300]
    assert repeated[300] == 3
