"""What holds for any input; PROPERTY_EXAMPLES=2000 tries that many random ones of each kind."""

import copy
import dataclasses
import itertools
import json
import operator
import os
import types
import typing

import pytest
from beartype.door import is_bearable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import chat, masked_text

from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.data.packing import packing
from zephyr_jax.data.prepare.convert import convert_row, example_of
from zephyr_jax.data.prepare.prepare import DATASETS, Selection
from zephyr_jax.data.prepare.records import serialize
from zephyr_jax.data.text.chat import render_chat

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "0"))
any_input = settings(
    max_examples=EXAMPLES or 20,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PARTS = ["</s>", "<s>", "<unk>", "<|user|>", "<|assistant|>", "▁", "é", "🙂", "\n", " ", "  "]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=5).map("".join)
NUMBERS = st.integers() | st.floats() | st.sampled_from((-1, 0, 1, 2**31, 2**64))
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.just("\ud800")
KEYS = st.sampled_from(["role", "content", "from", "value", "weight", "train", "tool_calls"])
JSON = st.recursive(SCALARS, lambda x: st.lists(x) | st.dictionaries(KEYS | TEXTS, x), max_leaves=5)
B = SCALARS | st.binary(max_size=3) | st.complex_numbers()
LITERALS = st.recursive(B, lambda x: st.lists(x).map(tuple) | st.dictionaries(B, x), max_leaves=3)
ODD = st.tuples(st.sampled_from(("9", "1e9", "-", "(", "[", "{[]: 1}")), st.sampled_from((1, 5000)))
WORDS = TEXTS | NUMBERS.map(str) | LITERALS.map(repr) | ODD.map(lambda x: x[0] * x[1])


@st.composite
def changed(draw, value):
    """JSON of which one to three values, at any depth, are others or are gone."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place, key = value, draw(st.sampled_from([*value]))
        while isinstance(inner := place[key], dict | list) and inner and draw(st.integers(0, 3)):
            keys = inner if isinstance(inner, dict) else range(len(inner))
            place, key = inner, draw(st.sampled_from([*keys]))
        if len(place) > 1 and draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(JSON)
    return value


@st.composite
def damaged(draw, content):
    """Bytes with up to four changes, most near their beginning, and perhaps without their end."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        end = len(content) if draw(st.booleans()) else min(len(content), 400)
        at, n = draw(st.integers(0, end)), draw(st.integers(0, 4))
        content[at : at + n] = draw(st.binary(max_size=9) | st.just(b"\xff" * n))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


def fields_of(cls, path=""):
    """The type of every field of a configuration, by its path."""
    for name, hint in typing.get_type_hints(cls).items():
        yield path + name, hint
        for section in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            yield from fields_of(section, f"{path}{name}.")


FIELDS = dict(fields_of(RunConfig))


@any_input
@given(st.sampled_from(sorted(FIELDS)), WORDS)
def test_an_override_is_a_value_of_its_fields_type_or_refused(field, word):
    try:
        config = load_config("zephyr_7b_dpo", [f"--config.{field}={word}"])
    except ValueError:  # which the command line shows in one line
        return
    assert is_bearable(operator.attrgetter(field)(config), FIELDS[field])
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config


TURNS = [{"role": role, "content": "What?", "train": 1} for role in ("user", "assistant")]
COLUMNS = {
    "data": ["a", "b"],
    "messages": [{"role": "system", "content": "Be brief."}, *TURNS],
    "conversations": [{"from": "human", "value": "a", "weight": 1}, {"from": "gpt", "value": "b"}],
    "history": [["a", "b"]],
    "chosen": TURNS,
    "rejected": [TURNS[0], TURNS[1] | {"content": "c"}],
    "completions": [{"response": "b", "overall_score": score} for score in (3.5, 1)],
} | {"score_chosen": 1, "chosen-rating": 1, "rejected-rating": 0, "label": 1, "kto_tag": 1}
SCHEMAS = [schema for kind in DATASETS.values() for schema in kind.schemas().values()]
OPTIONAL = st.sampled_from(["prompt_id", "source", "system", "input", "history", "score_chosen"])


@any_input
@given(st.data())
def test_a_raw_row_is_converted_or_counted_as_bad(data):
    schema = data.draw(st.sampled_from(SCHEMAS))
    names = (*data.draw(st.sampled_from(schema.shapes)), *data.draw(st.sets(OPTIONAL)))
    row = {name: COLUMNS.get(name, name) for name in names}
    row = data.draw(st.just(row) | changed(row))
    plan = types.SimpleNamespace(schema=schema, selection=Selection(max_chars=1000))
    outcome = convert_row(plan, (), row)
    assert outcome.unfit or outcome.records or outcome.rules
    for record in outcome.records:
        assert is_bearable([record["prompt"], record["prompt_id"]], list[str])
        serialize(record)
    for rule in [outcome.unfit] if outcome.unfit else outcome.rules:
        json.dumps(example_of(schema, row, outcome, rule))


@any_input
@given(contents=st.lists(TEXTS, min_size=1, max_size=5), system=st.none() | TEXTS)
def test_content_stands_in_its_turn_and_is_never_a_control_token(sp_tok, contents, system):
    turns = chat(*contents, system=system)
    ids, mask = render_chat(sp_tok, turns)
    control = [sp_tok.bos_id, *[sp_tok.eos_id] * len(turns)]
    assert [i for i in ids if i in sp_tok.specials.values()] == control
    texts = [turn["content"].replace("▁", " ") for turn in turns]
    answers = [x for x, turn in zip(texts, turns, strict=True) if turn["role"] == "assistant"]
    assert masked_text(sp_tok, ids, mask) == answers
    ends = [0, *(i + 1 for i, token in enumerate(ids) if token == sp_tok.eos_id)]
    spans = [sp_tok.decode(ids[start:end]) for start, end in itertools.pairwise(ends)]
    rendered = [f"<|{turn['role']}|>\n{x}" for x, turn in zip(texts, turns, strict=True)]
    assert "".join(spans) == "\n".join(rendered)
    assert sp_tok.decode(ids[ends[-1] :]) == "\n"


@pytest.mark.parametrize("are_pairs", [False, True])
@any_input
@given(sizes=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1), room=st.integers(0, 20))
def test_packed_rows_hold_every_document_once_and_whole(are_pairs, sizes, room):
    fresh, docs = itertools.count(1), []
    for number, parts in enumerate(sizes, 1):
        parts = [list(itertools.islice(fresh, n)) for n in parts]
        ids = [*itertools.chain(*parts)]
        dialogue = packing.dialogue_document(ids, [i % 3 > 0 for i in ids])
        docs.append(packing.pair_document(*parts, number) if are_pairs else dialogue)
    lengths = [len(doc.tokens) for doc in docs]
    seq_len, seen = max(lengths) + room, []
    for batch in packing.level_batches(lengths, 1 + room % len(docs), room, 0):
        for plan in packing.rows_of(lengths, batch, seq_len):
            seen += plan
            row, at = packing.build_row([docs[i] for i in plan], seq_len, len(docs) * are_pairs), 0
            for segment, doc in enumerate((docs[i] for i in plan), 1):
                here = slice(at, at + len(doc.tokens))
                assert (row["segments"][here] == segment).all()
                for name in ("tokens", "positions", "branches", "loss_mask"):
                    assert row[name][here].tolist() == getattr(doc, name).tolist()
                assert not are_pairs or row["pair_ids"][segment - 1] == doc.id
                at = here.stop
            assert not any(row[name][at:].any() for name in ("segments", "tokens", "loss_mask"))
    assert sorted(seen) == list(range(len(docs)))
