"""Marks of turns, and prompts: what is context only is no target, from raw rows to packed ones."""

from collections import Counter

import pytest
from raw_rows import everything, messages, of_parquet, sharegpt, system, through, unfit, write
from sample_templates import TEMPLATES, byte_level_files
from test_chat import OURS, chat, masked_text
from test_packed import config_of, rows_of

from zephyr_jax.__main__ import main
from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing.documents import Rendering, document_of
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import Split, prepare, report
from zephyr_jax.data.raw import dialogues, pairs, schema
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer

TEXTS = ["Which code?", "WRONG.", "Look again.", "It is 7."]
SCHEMA = dialogues.own_schemas()["own"]


def convert(row):
    return through(SCHEMA, row)


def marked(*marks):
    """The dialogue with one more key or several in each turn."""
    return [turn | mark for turn, mark in zip(messages(*TEXTS), marks, strict=True)]


CONTEXT = marked({}, {"train": False}, {}, {})
FALSE = [{key: not learn} for key, learn in schema.MARKS.items()]
FALSE += [{"weight": 0}, {"weight": 0.0}, {"train": "false"}, {"loss": "0"}, {"masked": 1}]
TRUE = [{key: learn} for key, learn in schema.MARKS.items()] + [{"weight": 1.0}, {"masked": 0}]


@pytest.mark.parametrize("mark", FALSE, ids=str)
def test_an_answer_marked_false_is_context(mark):
    counts = Counter(context_answer=1)
    for key in ("messages", "conversations"):
        row = {key: marked({}, mark, {}, {})}
        assert convert(row) == ({**convert(row)[0], "messages": CONTEXT}, counts)
    names = sharegpt(*zip(("human", "gpt", "human", "gpt"), TEXTS, strict=True))
    names[1] |= mark
    assert convert({"conversations": names})[0]["messages"] == CONTEXT
    names[1:] = marked({}, {}, {}, mark)[1:]  # the completion's last answer
    record, _ = convert({"prompt": "Which code?", "completion": names[1:]})
    assert [turn.get("train", True) for turn in record["messages"]] == [False, True, True, False]


@pytest.mark.parametrize("mark", TRUE, ids=str)
def test_an_answer_marked_true_is_learned(mark):
    record, counts = convert({"messages": marked({}, mark, {}, mark)})
    assert (record["messages"], counts) == (messages(*TEXTS), Counter())


def test_marks_of_parquet_have_nones():
    none = {"weight": None, "train": None}
    dialogue = marked(none, {"weight": 0}, none, {"weight": None, "train": True})
    [row] = of_parquet({"messages": dialogue})
    assert convert(row)[0]["messages"] == CONTEXT


def test_a_mark_on_another_turn_has_no_effect_and_one_that_is_true_is_counted():
    no, yes = {"weight": 0}, {"weight": 1}
    record, counts = convert({"messages": marked(no, {}, no, yes)})
    assert [turn.get("train", True) for turn in record["messages"]] == [False, True, False, True]
    assert counts == Counter()
    record, counts = convert({"messages": marked(yes, {}, {}, yes)})
    assert (record["messages"], counts) == (messages(*TEXTS), Counter(mark_without_effect=1))


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "not_0_or_1:messages[1].weight=0.5"),
        ({"train": "sometimes"}, "not_0_or_1:messages[1].train=sometimes"),
        ({"loss_mask": [0, 1]}, "not_0_or_1:messages[1].loss_mask=[0, 1]"),
        ({"weight": 1, "train": False}, "marks_differ:messages[1].{weight,train}"),
        ({"mask": 1}, "unsupported_mark:messages[1].mask"),
        ({"train_detail": [{"begin_offset": 0}]}, "unsupported_mark:messages[1].train_detail"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_named(mark, reason):
    assert unfit(SCHEMA, {"messages": marked({}, mark, {}, {})}) == reason


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": marked({}, {"weight": 0}, {}, {"weight": 0})}, "no_target_turn"),
        ({"messages": messages(*TEXTS), "weight": 0}, "marked_row"),
        ({"prompt": "a", "completion": {**messages("", "b")[1], "train": False}}, "no_target_turn"),
    ],
)
def test_a_dialogue_without_a_target_is_dropped_and_counted(row, rule):
    record, counts = convert(row)
    assert record is None
    assert counts[rule] == 1


def test_marks_of_a_whole_row():
    row = {"messages": messages(*TEXTS)}
    assert convert({**row, "weight": 1.0, "train": True}) == convert(row)
    assert unfit(SCHEMA, {**row, "weight": 0.3}) == "not_0_or_1:weight=0.3"
    columns = {"loss": 2.31, "loss_mask": [0, 1], "tools": [{"name": "f"}], "label": "bad"}
    for key, value in columns.items():
        assert convert({**row, key: value})[1] == Counter([f"unread_column:{key}"])


def test_only_the_completion_is_learned():
    names = sharegpt(*zip(("user", "bot", "user"), TEXTS, strict=False))
    for prompt in (messages(*TEXTS[:3]), names):
        for answer in (TEXTS[3], messages("", TEXTS[3])[1], messages("", TEXTS[3])[1:]):
            for key in ("completion", "response"):
                record, counts = convert({"prompt": prompt, key: answer, "system": "Be brief."})
                learned = [turn for turn in record["messages"] if turn.get("train", True)]
                assert learned == messages("", TEXTS[3])[1:]
                assert [turn["role"] for turn in record["messages"][:2]] == ["system", "user"]
                assert counts == Counter(context_answer=1)
    record, _ = convert({"prompt": TEXTS[0], "completion": messages("", *TEXTS[1:])[1:]})
    assert [turn.get("train", True) for turn in record["messages"]] == [False, True, True, True]


def test_marks_of_pairs_are_counted_or_drop_the_pair():
    own = pairs.own_schemas()["own"]
    question, good, bad = *messages("Why?", "So."), messages("", "No.")[1]
    row = {"chosen": [question, good], "rejected": [question, bad]}
    plain, _ = through(own, row)
    for mark in ({"weight": 1}, {"train": True}):
        marked_row = {"chosen": [question, good | mark], "rejected": [question, bad | mark]}
        assert through(own, marked_row) == (plain, Counter())
    earlier = [*messages("Hi", "Hello"), question]
    earlier[1]["weight"] = 1
    record, counts = through(own, {"prompt": earlier, "chosen": [good], "rejected": [bad]})
    assert record["chosen"] == [*messages("Hi", "Hello"), question, good]
    assert counts == Counter(mark_without_effect=1)
    earlier[1]["weight"] = 0  # it is context anyway
    assert through(own, {"prompt": earlier, "chosen": [good], "rejected": [bad]})[1] == Counter()
    row = {"chosen": [question, good], "rejected": [question, bad | {"weight": 0}]}
    assert through(own, row) == (None, Counter(no_target_turn=1))
    row["rejected"][1]["weight"] = 0.5
    assert unfit(own, row) == "not_0_or_1:rejected[1].weight=0.5"


RECORD = {"messages": [system(), *CONTEXT], "prompt": TEXTS[0], "prompt_id": "0"}


@pytest.mark.parametrize("kind", ["toy", "mistral", *TEMPLATES])
@pytest.mark.parametrize("max_length", [512, None], ids=["best_fit", "concat"])
def test_targets_are_the_answers_that_are_not_context(kind, max_length, request):
    files = kind in TEMPLATES and byte_level_files(kind, n_merges=0)
    tok = JsonTokenizer(files) if files else request.getfixturevalue(kind)
    record = {**RECORD, "messages": RECORD["messages"][int(kind == "strict") :]}

    def targets(loss_on):
        config = ChatConfig(**OURS, loss_on=loss_on, score_header=False)
        return document_of(tok, Rendering(config, False, max_length), record, "here")

    document = targets("assistant")
    shown = masked_text(tok, document.tokens.tolist(), document.loss_mask.tolist())
    assert [text.strip() for text in shown] == [TEXTS[3]]
    document = targets("all")
    ids, mask = document.tokens.tolist(), document.loss_mask.tolist()
    learned = tok.decode([i for i, target in zip(ids, mask, strict=True) if target])
    assert "WRONG" in tok.decode(ids)
    assert "WRONG" not in learned
    for text in (TEXTS[0], TEXTS[2], TEXTS[3]):
        assert text in learned
    ids, mask = render_chat(tok, chat(*TEXTS), loss_on_all=True)
    assert (ids, mask) == (render_chat(tok, chat(*TEXTS))[0], [1] * len(ids))


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_marks_go_through_preparing_packing_and_inspection(packing, toy, tmp_path, capsys):
    talks = [[f"Room {n}?", f"WRONG {n}.", "Look again.", f"It is {n}."] for n in range(30)]
    rows = [{"messages": messages(*talk)} for talk in talks]
    for row in rows:
        row["messages"][1]["weight"] = 0
        row["messages"][3]["weight"] = 1
    rows += [{"prompt": f"Room {n}?", "completion": f"It is {n}."} for n in range(30, 60)]
    path = prepare("messages", write(tmp_path / "rows.jsonl", rows), tmp_path)
    assert report(path)["rules"] == {"context_answer": 30}
    main(["inspect_data", "set", str(path)])
    shown = capsys.readouterr().out
    assert 0 < shown.count("assistant, context only\n") == shown.count("WRONG")
    assert "assistant\n" in shown
    for record in (record for split in everything(path).values() for record in split):
        number = int(record["prompt"][5:-1])
        talk = messages(*talks[number] if number < 30 else rows[number].values())
        talk[number < 30]["train"] = False
        assert record["messages"] == talk
    config = config_of("demo_sft", tmp_path, dataset="messages/own", packing=packing, seq_len=96)
    rows = rows_of(build_packed(config, toy), "train")
    learned = toy.decode(rows["tokens"][rows["loss_mask"]].tolist())
    assert "WRONG" not in learned
    assert "WRONG" in toy.decode(rows["tokens"].flatten().tolist())
    assert "It is" in learned


def test_sets_of_an_earlier_version_learn_from_every_answer(toy):
    columns = {"role": [b"user", b"assistant"], "content": [b"Why?", b"So."]}
    [record] = Split("", [{"prompt": b"Why?", "messages": columns}])[:]
    assert record == {"prompt": "Why?", "messages": messages("Why?", "So.")}
    assert sum(render_chat(toy, record["messages"])[1]) > 1
