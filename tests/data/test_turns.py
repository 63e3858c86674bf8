"""Turns as people write them: kin of the roles, parts, tools, and what is not read."""

import json
from collections import Counter

import pytest
from raw_rows import messages, of_parquet, report, sharegpt, system, through, unfit, write
from sample_templates import byte_level_files, changed
from test_chat import masked_text
from test_packed import config_of

from zephyr_jax.__main__ import main
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import read_split
from zephyr_jax.data.raw import dialogues, pairs
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer

SCHEMA = dialogues.own_schemas()["own"]
KEEP = CleaningRules(False, False, keep_tool_turns=True)


def convert(row):
    return through(SCHEMA, row)


@pytest.mark.parametrize(
    "names", [(" System ", "HUMAN", "model"), ("sys", "end-user", "AI assistant")]
)
def test_the_kin_of_the_three_roles(names):
    texts = "Be brief.", "Why?", "So."
    expected = [system(), *messages(*texts[1:])]
    turns = [{"role": name, "content": text} for name, text in zip(names, texts, strict=True)]
    for row in ({"messages": turns}, {"conversations": sharegpt(*zip(names, texts, strict=True))}):
        record, counts = convert(row)
        assert (record["messages"], counts) == (expected, Counter())


def test_text_in_parts_is_joined():
    text = {"type": "text", "text": "Why?"}
    for content in ([text], [text, {"type": "input_text", "text": "Now?"}], ["Why?", "Now?"]):
        turns = [{"role": "user", "content": content}, messages("", "So.")[1]]
        record, counts = convert({"messages": turns})
        whole = "Why?\nNow?" if len(content) == 2 else "Why?"
        assert (record["prompt"], counts) == (whole, Counter())
    part = {"type": "text", "text": "Why?", "image_url": None}
    turns = [{"role": role, "content": [part]} for role in ("user", "model")]
    [row, _] = of_parquet({"messages": turns}, {})
    assert convert(row)[0]["messages"] == messages("Why?", "Why?")


def test_parts_that_are_no_text_drop_the_row_and_are_counted():
    image = {"type": "image_url", "image_url": {"url": "x.png"}}
    content = [{"type": "text", "text": "What is it?"}, image]
    row = {"messages": [{"role": "user", "content": content}, messages("", "A cat.")[1]]}
    assert convert(row) == (None, Counter({"not_text:image_url": 1}))
    assert SCHEMA.texts(row, "not_text:image_url") == ["user: What is it?"]
    pair = {"prompt": row["messages"][:1], "chosen": "A cat.", "rejected": "A dog."}
    assert through(pairs.own_schemas()["own"], pair) == (None, Counter({"not_text:image_url": 1}))


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "asistant", "content": "So."}, "unknown_role:messages[1].role=asistant"),
        ({"role": "", "content": "So."}, "unknown_role:messages[1].role="),
        ({"role": "assistant", "contnet": "So."}, "missing_key:messages[1].content"),
        ({"rol": "assistant", "content": "So."}, "unknown_keys:messages[1]{content,rol}"),
        ({"role": "assistant", "content": 3}, "wrong_type:messages[1].content"),
        ({"role": "assistant", "content": ["a", 3]}, "wrong_type:messages[1].content[1]"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "wrong_type:messages[1].content[0]"),
    ],
)
def test_a_turn_that_cannot_be_read_is_a_bad_row(turn, reason):
    assert unfit(SCHEMA, {"messages": [*messages("Why?"), turn]}) == reason


@pytest.mark.parametrize("key", ["reasoning_content", "name", "refusal", "audio", "wieght"])
def test_other_keys_of_a_message_are_counted_by_name(key):
    turns = messages("Why?", "So.")
    plain = convert({"messages": turns})[0]
    turns[1] |= {key: "x", "id": 3, "timestamp": "now", "tool_calls": [], "prefix": None}
    row = {"messages": turns}
    assert convert(row) == (plain, Counter([f"unread_key:{key}"]))
    assert SCHEMA.texts(row, f"unread_key:{key}") == [f"{key}: x"]
    own = pairs.own_schemas()["own"]
    pair = {"prompt": "Why?", "chosen": turns[1:], "rejected": "No."}
    assert through(own, pair)[1] == Counter([f"unread_key:{key}"])


CALL = {"type": "function", "function": {"name": "code", "arguments": {"room": 7}}}
WRITTEN = {**CALL, "id": "c1", "function": {"name": "code", "arguments": '{"room": 7}'}}
QUESTION, ANSWER = messages("Which code?", "It is 42.")
RESULT = {"role": "tool", "content": "42"}
TALK = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWER]
CALLING = {"role": "assistant", "content": None, "tool_calls": [WRITTEN]}
OPENAI = [QUESTION, CALLING, {**RESULT, "tool_call_id": "c1"}, ANSWER]
FUNCTION = {"role": "assistant", "content": None, "function_call": WRITTEN["function"]}
LEGACY = [QUESTION, FUNCTION, {"role": "function", "name": "code", "content": "42"}, ANSWER]
SHAREGPT = sharegpt(
    ("human", "Which code?"),
    ("function_call", '{"name": "code", "arguments": {"room": 7}}'),
    ("observation", "42"),
    ("gpt", "It is 42."),
)
TEXT = [QUESTION, CALLING | {"tool_calls": json.dumps([json.dumps(WRITTEN)])}, *OPENAI[2:]]
TOOL_ROWS = {
    "openai": ({"messages": OPENAI}, {"id": "c1"}, {"tool_call_id": "c1"}),
    "text": ({"messages": TEXT}, {"id": "c1"}, {"tool_call_id": "c1"}),
    "legacy": ({"messages": LEGACY}, {}, {"name": "code"}),
    "sharegpt": ({"conversations": SHAREGPT}, {}, {}),
}


@pytest.mark.parametrize("kind", TOOL_ROWS)
def test_turns_of_tools_are_dropped_or_kept(kind):
    row, of_call, of_result = TOOL_ROWS[kind]
    assert convert(row) == (None, Counter(tool_turn=1))
    record, counts = through(dialogues.own_schemas(KEEP)["own"], row)
    expected = [TALK[0], {**TALK[1], "tool_calls": [CALL | of_call]}, TALK[2] | of_result, TALK[3]]
    assert (record["messages"], counts) == (expected, Counter(tool_turn_kept=1))


@pytest.mark.parametrize("calls", ["run it", [{"id": 3}], [WRITTEN, "[7]"]])
def test_what_is_no_call_of_a_tool_drops_the_dialogue(calls):
    row = {"messages": [QUESTION, CALLING | {"tool_calls": calls}, *OPENAI[2:]]}
    record, counts = through(dialogues.own_schemas(KEEP)["own"], row)
    assert (record, counts["not_text:tool_call"]) == (None, 1)
    assert convert(row)[1]["tool_turn"] == 1


def test_a_pair_or_a_labeled_answer_with_tools_is_dropped():
    pair = {"prompt": OPENAI[:3], "chosen": OPENAI[3:], "rejected": "No."}
    assert through(pairs.own_schemas()["own"], pair) == (None, Counter(tool_turn=1))
    row = {"messages": OPENAI, "label": True}
    assert through(dialogues.unpaired_schemas()["own"], row) == (None, Counter(tool_turn=1))


ORDERS = ("u a", "u a t a", "u a t t a u a", "s u a t a t a")


@pytest.mark.parametrize("order", [*ORDERS, "u t a", "u a t", "u a a", "t a", "u a t u a"])
def test_results_stand_between_two_turns_of_the_assistant(order):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = [{"role": names[role], "content": "x"} for role in order.split()]
    record, _ = through(dialogues.own_schemas(KEEP)["own"], {"messages": turns})
    assert (record is not None) is (order in ORDERS)


SHOWN = (  # as Hermes and Qwen: calls in tags, results in a turn of their own
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' }}{{ call.function | tojson }}{{ '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_CALLS = SHOWN.replace("m.tool_calls or []", "[]")
WITHOUT_RESULTS = SHOWN.replace("in messages", "in messages if m.role != 'tool'")


def of_template(template):
    files = byte_level_files("chatml", n_merges=0)
    return JsonTokenizer(changed(files, "tokenizer_config.json", chat_template=template))


def test_a_template_renders_calls_and_results():
    tok = of_template(SHOWN)
    ids, mask = render_chat(tok, TALK)
    assert "tool\n42" in tok.decode(ids)
    call = '<call>{"name": "code", "arguments": {"room": 7}}</call>'
    assert masked_text(tok, ids, mask) == [call, "It is 42."]
    first = {**TALK[1], "train": False}
    assert masked_text(tok, *render_chat(tok, [TALK[0], first, *TALK[2:]])) == ["It is 42."]
    spelled = {**CALL, "function": {"name": "code", "arguments": {"room": "<|im_end|>"}}}
    turns = [TALK[0], {**TALK[1], "tool_calls": [spelled]}, *TALK[2:]]
    with pytest.raises(ValueError, match="call of a tool spells a special token"):
        render_chat(tok, turns)
    assert render_chat(tok, turns, parse_special=True)[0].count(tok.eos_id) == 5


def test_a_template_that_leaves_out_calls_or_results_is_refused():
    for template, message in ((WITHOUT_CALLS, "1 .assistant"), (WITHOUT_RESULTS, "2 .tool")):
        with pytest.raises(ValueError, match=f"leaves out what message {message}"):
            render_chat(of_template(template), TALK)


def test_tools_go_through_preparing_and_packing(toy, tmp_path, refused):
    rows = [{"messages": messages(f"Why {n}?", "So.")} for n in range(20)]
    rows += [{"messages": OPENAI}] * 3
    source = write(tmp_path / "rows.jsonl", rows)
    words = ["prepare_data", "messages", f"--source={source}", "--holdout=0.3"]
    main([*words, f"--data_dir={tmp_path}", "--tool_turns=keep"])
    path = tmp_path / "messages" / "own" / "1.1.0"
    assert report(path)["rules"] == {"tool_turn_kept": 3}
    kept = [r["messages"] for s in ("train_sft", "test_sft") for r in read_split(path, s)]
    expected = [TALK[0], {**TALK[1], "tool_calls": [{**CALL, "id": "c1"}]}]
    expected += [{**TALK[2], "tool_call_id": "c1"}, TALK[3]]
    assert [turns for turns in kept if len(turns) == 4] == [expected] * 3
    config = config_of("demo_sft", tmp_path, dataset="messages/own")
    refusal = r"record \d+ \(prompt_id \w+, 'Which code\?'\): message 1 .*with tool_calls"
    with pytest.raises(ValueError, match=refusal):
        build_packed(config, toy)
    assert build_packed(config, of_template(SHOWN)).manifest["splits"]
    words = ["prepare_data", "preferences", *words[2:], "--data_dir=x", "--tool_turns=keep"]
    assert "--tool_turns has no effect on preferences" in refused(*words)
