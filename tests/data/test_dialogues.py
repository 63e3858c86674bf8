"""Dialogues, their cleaning, and labeled answers (of KTO) become records, whatever their shape."""

import doctest
import time
from collections import Counter

import pytest
from raw_rows import everything, messages, of_parquet, sharegpt, system, through, unfit, write

from zephyr_jax.__main__ import main
from zephyr_jax.data.prepare.prepare import prepare, report
from zephyr_jax.data.raw import cleaning, dialogues, schema
from zephyr_jax.data.raw.binarize import BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules, refusal, truecase
from zephyr_jax.data.raw.pairs import own_schemas as pair_schemas
from zephyr_jax.data.raw.schema import prompt_digest

TEXTS = ["Why?", "So.", "And then?", "That."]
SCHEMA = dialogues.own_schemas()["own"]
ID = prompt_digest("Why?")


def convert(row, rules=None):
    """The record of a row and the counts; every example is checked on the way."""
    return through(dialogues.own_schemas(rules)["own"], row)


def test_docstrings_are_true():
    assert doctest.testmod(schema) == (0, 1)
    assert doctest.testmod(cleaning) == (0, 2)


ROWS = {
    "messages": {"messages": messages(*TEXTS)},
    "messages and other columns": {"messages": messages(*TEXTS), "prompt": "x", "id": 3, "data": 1},
    "sharegpt": {
        "conversations": sharegpt(*zip(("human", "gpt", "user", "bing"), TEXTS, strict=True))
    },
    "sharegpt with role and content": {"conversations": messages(*TEXTS)},
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_becomes_the_same_dialogue(shape):
    record = {"prompt": "Why?", "prompt_id": ID, "messages": messages(*TEXTS)}
    assert convert(ROWS[shape]) == (record, Counter())


def test_alpaca_joins_input_and_puts_the_system_first():
    row = {"instruction": "Say:", "input": "Oui", "output": "Yes", "system": "Be brief."}
    record, _ = convert(row)
    assert record["messages"] == [system(), *messages("Say:\n\nOui", "Yes")]
    assert record["prompt"] == "Say:\n\nOui"
    assert convert({**row, "instruction": ""})[0]["prompt"] == "Oui"
    assert convert({**row, "instruction": "", "input": None}) == (None, Counter(empty_turn=1))
    record, _ = convert({**row, "history": [["Why?", "So."]]})
    assert record["messages"] == [system(), *messages("Why?", "So.", "Say:\n\nOui", "Yes")]
    row = {"messages": [system("Mine."), *messages("Why?", "So.")], "system": "Column."}
    record, counts = convert(row)
    assert record["messages"][0] == system("Mine.")
    assert counts == Counter(["unread_column:system"])
    assert convert(row | {"system": "Mine."}) == (record, Counter())


@pytest.mark.parametrize("own_id", ["mine", "", None])
def test_the_prompt_id_of_the_row_stays(own_id):
    record, _ = convert({**ROWS["messages"], "prompt_id": own_id})
    assert record["prompt_id"] == (own_id or ID)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": []}, "empty_dialogue"),
        ({"messages": messages("Why?", " ")}, "empty_turn"),
        ({"messages": [*messages("Why?"), *messages("Why?", "So.")]}, "bad_roles"),
        ({"messages": messages("So.", "Why?", "That.", first="assistant")}, "bad_roles"),
        ({"messages": [system(), system(), *messages("Why?", "So.")]}, "bad_roles"),
        ({"prompt": "Why?", "completion": "So.", "label": False}, "label_false"),
    ],
)
def test_dialogues_are_dropped_and_counted(row, rule):
    assert convert(row) == (None, Counter([rule]))


def test_unanswered_questions_and_unasked_answers_are_cut_off():
    record, counts = convert({"messages": [*messages(*TEXTS), *messages("Eh?")]})
    assert record["messages"] == messages(*TEXTS)
    assert counts == Counter(trailing_user_turn=1)
    leading = [("system", "Be brief."), ("gpt", "Hello!"), ("human", "why?"), ("gpt", "So.")]
    record, counts = convert({"conversations": sharegpt(*leading, ("human", " "))}, CleaningRules())
    assert record["messages"] == [system(), *messages("Why?", "So.")]
    assert counts == Counter(leading_answer=1, trailing_user_turn=1, truecase=1)


def test_examples_show_what_a_rule_objected_to():
    row = {"messages": [*messages(*TEXTS), *messages("Eh?")]}
    record, _ = convert(row)
    texts = SCHEMA.texts(row, "trailing_user_turn")
    assert texts == [*SCHEMA.texts(record, "trailing_user_turn"), "user: Eh?"]
    row = {"messages": [*messages("Why?"), {"role": "tool", "content": "4"}]}
    assert SCHEMA.texts(row, "tool_turn") == ["tool: 4"]


def test_cleaning_is_off_by_default():
    row = {"messages": [system("be brief."), *messages("why?", "well. as an AI, so.")]}
    record, counts = convert(row)
    assert (record["messages"], counts) == (row["messages"], Counter())
    record, counts = convert(row, CleaningRules(drop_refusals=False))
    assert record["messages"] == [system("be brief."), *messages("Why?", "Well. As an AI, so.")]
    assert (record["prompt_id"], counts) == (ID, Counter(truecase=1))
    assert convert(row, CleaningRules()) == (None, Counter(refusal=1))
    own = dialogues.own_schemas(CleaningRules())["own"]
    assert own.texts(row, "refusal")[0].startswith("As an AI: ")


def test_rows_of_pairs_do_not_fit():
    for key in ("chosen", "rejected"):
        assert not SCHEMA.fits({**ROWS["messages"], key: []})
    for row in ROWS.values():
        assert not pair_schemas()["own"].fits(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Why?"}, "missing_key:messages"),
        ({"messages": None}, "wrong_type:messages"),
        ({"messages": [{"role": None, "content": "Why?"}]}, "wrong_type:messages[0].role"),
        ({"instruction": "a", "output": None}, "wrong_type:output"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "wrong_type:history"),
        ({"prompt": "a", "completion": 3}, "wrong_type:completion"),
        ({"prompt": "a", "response": "b", "prompt_id": 3}, "wrong_type:prompt_id"),
    ],
)
def test_the_reason_of_an_unfit_dialogue_names_the_place(row, reason):
    assert unfit(SCHEMA, row) == reason


def test_ultrachat_rows_of_wrong_types_are_unfit():
    for name, row in {
        "raw": {"id": "0", "data": ["Why?", "So."]},
        "200k": {"prompt": "Why?", "prompt_id": "0", "messages": messages("Why?", "So.")},
    }.items():
        schema = dialogues.ultrachat_schemas()[name]
        assert unfit(schema, row) is None
        reasons = {unfit(schema, {**row, key: None}) for key in row}
        assert reasons == {f"wrong_type:{key}" for key in row}


TURNS = messages("Why?", "So.")
LABELED = {
    "texts": {"prompt": "Why?", "completion": "So."},
    "response": {"prompt": "Why?", "response": "So."},
    "turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "turns and a text": {"prompt": TURNS[:1], "completion": "So."},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": sharegpt(("human", "Why?"), ("gpt", "So."))},
    "alpaca": {"instruction": "Why?", "output": "So."},
}


def labeled(row, **rules):
    return through(dialogues.unpaired_schemas(BinarizationRules(**rules))["own"], row)


@pytest.mark.parametrize("shape", LABELED)
def test_every_shape_becomes_the_same_labeled_answer(shape):
    record = {"prompt": "Why?", "prompt_id": ID, "messages": TURNS, "source": ""}
    for value, label in ((True, True), (1, True), (0.0, False), ("false", False)):
        counts = Counter(["desirable" if label else "undesirable"])
        for row in ({**LABELED[shape], "label": value}, {**LABELED[shape], "kto_tag": value}):
            assert labeled(row) == ({**record, "label": label}, counts)
            [parquet, _] = of_parquet(row, {**row, "source": "x", "system": "y"})
            assert labeled(parquet) == ({**record, "label": label}, counts)
    row = LABELED[shape] | {"label": True, "system": "Be brief."}
    row |= {"source": "web", "prompt_id": "7"}
    record, _ = labeled(row)
    assert record["messages"] == [system(), *TURNS]
    assert (record["source"], record["prompt_id"]) == ("web", "7")
    assert labeled(row, drop_sources=("web",)) == (None, Counter(source_dropped=1))


def test_a_prompt_of_several_turns_is_identified_by_all_of_them():
    rows = [{"messages": messages("Hi", text, "Why?", "So."), "label": True} for text in "ab"]
    one, other = (labeled(row)[0] for row in rows)
    assert one["prompt"] == other["prompt"] == "Hi"
    assert one["prompt_id"] != other["prompt_id"]


@pytest.mark.parametrize("label", [None, 2, 0.5, "good", [True]])
def test_a_label_that_is_neither_true_nor_false_does_not_fit(label):
    schema = dialogues.unpaired_schemas()["own"]
    reason = f"not_true_or_false:label={label}"
    assert unfit(schema, {"prompt": "Why?", "completion": "So.", "label": label}) == reason
    assert unfit(schema, {"messages": TURNS}) == "missing_key:label"


def test_answers_to_a_prompt_are_in_one_split_and_both_labels_are_counted(tmp_path, capsys):
    texts = [{"prompt": f"Do {n // 3}", "completion": f"Done {n}."} for n in range(120)]
    rows = [text | {"label": n % 3 == 0} for n, text in enumerate(texts)]
    path = prepare("unpaired", write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "mine")
    assert report(path)["rules"] == {"undesirable": 80, "desirable": 40}
    splits = everything(path)
    assert sorted(splits) == ["test_prefs", "train_prefs"]
    prompts = [{record["prompt"] for record in records} for records in splits.values()]
    assert not prompts[0] & prompts[1]
    records = [record for split in splits.values() for record in split]
    assert len(records) == 120
    for record in records:
        answer = record["messages"][-1]["content"]
        assert record["label"] is (int(answer[5:-1]) % 3 == 0)
    main(["inspect_data", "set", str(path)])
    label = "desirable" if splits["train_prefs"][0]["label"] else "undesirable"
    assert f", {label}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes. no? maybe! so", "Yes. No? Maybe! So"),
        ("One.  two", "One.  Two"),
        ("Title\nbody text", "Title\nBody text"),
        ("i think i am. i'll go, and i\u2019d stay", "I think I am. I'll go, and I\u2019d stay"),
        ("él sabe. ¿y tú?", "Él sabe. ¿y tú?"),
        ("a dog. a cat.", "A dog. A cat."),
        ("Read https://a.org/x. then `y`. then z", "Read https://a.org/x. Then `y`. Then z"),
    ],
)
def test_truecase_gives_capitals(text, expected):
    assert truecase(text) == expected
    assert truecase(expected) == expected


LOWER = (  # between bars
    "iPhone sales rose. eBay fell.\nmacOS too|See `a. b` and `i` there.|```\nlower. case i\n```|"
    "Unclosed:\n```python\nimport os\nx. y|~~~\nlower. i\n~~~|https://a.org/b. x|"
    "www.site.org/i is up|me@site.org wrote|"
    "Well... maybe, e.g. here, i.e. in the U.S. army, etc. and so on|J. smith|"
    "import numpy\nreturn x|    indented. code|- Country: France\n  capital: Paris|foo(x). bar|"
    "x = 1. then|for i in range(3):|Compare a[i] with i, then move i|i, ii and iii|"
    "apple, 3\npear, 4|x squared\ny squared|1.5 kg. 2 kg|snake_case is a name|"
    "This line goes on for quite a while and was wrapped by\nan editor|"
)


@pytest.mark.parametrize("text", LOWER.split("|"))
def test_truecase_leaves_alone(text):
    assert truecase(text) == text


def test_truecase_is_linear_in_hostile_texts():
    start = time.process_time()
    for unit in ("a", "a.b", "`", "a@", "http://", ". a", " i", "f(", "a'", "x-", "~"):
        truecase("x\n" + unit * 20_000 + "\nlower")
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("I do not have emotions.", "I do not have emotions"),
        ("well, i don\u2019t\nhave personal opinions!", "I don't have personal opinions"),
        ("AS AN AI LANGUAGE MODEL, no", "As an AI language model"),
        ("As an AI, I", "As an AI"),
        ("I don't have beliefs. As an AI ...", "I don't have beliefs"),
        ("As an aim of mine", None),
        ("I don't have opinionsabout", None),
        ("I have opinions", None),
    ],
)
def test_refusal(text, phrase):
    assert refusal(text) == phrase
    assert refusal("No (really) can't", ["(really)x", "can\u2019t"]) == "can\u2019t"


def cleaned(texts, rules):
    """The cleaned texts of a dialogue, None of a dropped one, and the counts."""
    turns, counts = cleaning.clean_dialogue(messages(*texts), rules)
    return turns and [turn["content"] for turn in turns], counts


def test_only_the_assistant_can_refuse_and_rules_can_be_switched_off():
    assert cleaned(["Q", "A", "Q"], CleaningRules()) == (None, Counter(odd_dialogue=1))
    turns = ["As an AI, do you dream?", "No."]
    assert cleaned(turns, CleaningRules()) == (turns, Counter())
    turns = ["hi. you", "as an AI i refuse. really"]
    assert cleaned(turns, CleaningRules(truecase=False, drop_refusals=False)) == (turns, Counter())
    texts, counts = cleaned(turns, CleaningRules(refusal_phrases=("no",)))
    assert texts == ["Hi. You", "As an AI I refuse. Really"]
    assert counts == Counter(truecase=1)
