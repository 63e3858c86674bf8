"""The packed set: what goes into it, what is counted, and the steps that follow from it."""

import dataclasses

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from raw_rows import dialogue, write
from sample_templates import TEMPLATES, byte_level_files
from sample_tokenizers import train_model

from zephyr_jax.config import load_config
from zephyr_jax.data.chat import render_pair
from zephyr_jax.data.json_tokenizer import JsonTokenizer
from zephyr_jax.data.packed import build_packed
from zephyr_jax.data.pipeline import make_plan, read_batches
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.rows import prompt_digest
from zephyr_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.optim import make_schedule, warmup_steps

N_DIALOGUES, N_LONG = 60, 20
PAIR = {"bos": True, "legacy_specials": False, "append_eos": False, "empty_system": False}


@pytest.fixture(scope="module")
def tok():
    return SentencePieceTokenizer(train_model())


def config_of(recipe, folder, **data):
    config = load_config(recipe)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_dir=str(folder), **data)
    )


@pytest.fixture(scope="module")
def dialogues(tok, tmp_path_factory):
    """A set of dialogues, of which some have a question that leaves no room for the answer."""
    root = tmp_path_factory.mktemp("dialogues")
    long = [{"id": f"l{i}", "data": [f"why {i}? " * 200, "So."]} for i in range(N_LONG)]
    write(root / "raw" / "train.jsonl", [*map(dialogue, range(N_DIALOGUES)), *long])
    prepare("ultrachat", root / "raw", root)
    config = config_of("demo_sft", root)
    return config, build_packed(config, tok, 1)


def test_steps_are_counted_from_packed_rows(dialogues):  # pitfall 25
    config, packed = dialogues
    info = packed.manifest["splits"]["train"]
    written = len(ArrayRecordDataSource([str(packed.folder / name) for name in info["files"]]))
    assert info["rows"] == written < info["documents"] / 2
    plan = make_plan(packed, 2, 3, 0)
    assert plan.steps_per_epoch == -(-written // 2)
    assert plan.train_steps == 3 * plan.steps_per_epoch
    for steps in (plan.train_steps, make_plan(packed, 2, 3, 5).train_steps):
        rate = make_schedule(config.optim, steps)
        assert rate(steps - 1) > 0
        assert rate(steps) < 1e-9
        assert warmup_steps(config.optim, steps) == -(-steps // 10)
    batches = read_batches(packed, plan, "train", 0, plan.steps_per_epoch, 0)
    assert sum(int(b.rows.segments.max(axis=1).sum()) for b in batches) == info["documents"]


def test_a_dialogue_without_room_for_an_answer_is_dropped_and_counted(dialogues):  # pitfall 7
    _, packed = dialogues
    splits = packed.manifest["splits"].values()
    assert sum(info["read"] for info in splits) == N_DIALOGUES + N_LONG
    assert sum(info["dropped_no_target"] for info in splits) == N_LONG
    assert sum(info["truncated"] for info in splits) == N_LONG
    assert sum(info["documents"] for info in splits) == N_DIALOGUES
    for split, info in packed.manifest["splits"].items():
        for row in packed.rows(split).read(range(info["rows"])):
            for segment in range(1, row["segments"].max() + 1):
                assert row["loss_mask"][row["segments"] == segment].any()


def test_the_conversation_is_the_turns_and_not_the_prompt_column(tok, tmp_path):  # pitfall 12
    said = ["first question", "its answer", "second question"]
    rows = []
    for number in range(60):
        turns = [
            {"role": role, "content": f"{text} {number}"}
            for role, text in zip(("user", "assistant", "user"), said, strict=True)
        ]
        good, bad = ([*turns, {"role": "assistant", "content": text}] for text in ("good", "bad"))
        prompt = turns[0]["content"]
        rows.append(
            {"prompt": prompt, "prompt_id": prompt_digest(prompt), "chosen": good, "rejected": bad}
            | {"messages": good, "score_chosen": 8.0, "score_rejected": 3.0}
        )
    write(tmp_path / "raw.jsonl", rows)
    prepare("ultrafeedback", tmp_path / "raw.jsonl", tmp_path, "binarized")
    config = config_of("demo_dpo", tmp_path, dataset="ultrafeedback/binarized")
    packed = build_packed(config, tok, 1)
    n_rows = packed.manifest["splits"]["eval"]["rows"]
    seen = 0
    for row in packed.rows("eval").read(range(n_rows)):
        for segment in range(1, row["segments"].max() + 1):
            trunk = row["tokens"][(row["segments"] == segment) & (row["branches"] == 0)]
            text = tok.decode(trunk)
            assert [text.count(part) for part in said] == [1, 1, 1]
            seen += 1
    assert seen == packed.manifest["splits"]["eval"]["documents"] > 0
    assert np.count_nonzero(packed.rows("eval").read(range(n_rows))["pair_ids"]) == seen


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_set_of_dialogues_is_packed(kind, tmp_path):
    tok = Tokenizer.from_file(JsonTokenizer(byte_level_files(kind)).save(tmp_path / "tok"))
    write(tmp_path / "raw" / "train.jsonl", [dialogue(n) for n in range(40)])
    prepare("ultrachat", tmp_path / "raw", tmp_path)
    packed = build_packed(config_of("demo_sft", tmp_path), tok, 1)
    answers = 0
    for split, info in packed.manifest["splits"].items():
        for row in packed.rows(split).read(range(info["rows"])):
            assert set(row["tokens"][row["segments"] == 0]) <= {0}
            for segment in range(1, row["segments"].max() + 1):
                tokens = row["tokens"][row["segments"] == segment]
                mask = row["loss_mask"][row["segments"] == segment]
                assert mask[-1]
                assert tokens[-1] == tok.eos_id
                answers += int(np.diff(mask.astype(int), prepend=0).clip(0).sum())
    assert packed.manifest["made_from"]["tokenizer"] == tok.digest
    assert answers >= 40


def rated_pair(n):
    asked = f"question {n}? <|im_end|></s>"
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        for text in (f"\n\ngood {n}", f"bad </s> {n}")
    ]
    ids = {"prompt": asked, "prompt_id": prompt_digest(asked)}
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return ids | {"chosen": chats[0], "rejected": chats[1], "messages": chats[0]} | scores


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_set_of_pairs_is_packed(kind, tmp_path):
    tok = JsonTokenizer(byte_level_files(kind))
    write(tmp_path / "raw.jsonl", [rated_pair(n) for n in range(40)])
    prepare("ultrafeedback", tmp_path / "raw.jsonl", tmp_path, "binarized")
    config = config_of("demo_dpo", tmp_path, dataset="ultrafeedback/binarized")
    packed = build_packed(config, tok, 1)
    made = set()
    for n in range(40):
        row = rated_pair(n)
        contents = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        pair = render_pair(tok, row["chosen"][:1], *contents, **PAIR)
        made.add((tuple(pair.prompt), tuple(pair.chosen), tuple(pair.rejected)))
    for split, info in packed.manifest["splits"].items():
        for row in packed.rows(split).read(range(info["rows"])):
            for segment in range(1, row["segments"].max() + 1):
                here = row["segments"] == segment
                tokens, branches = row["tokens"][here], row["branches"][here]
                trunk, chosen, rejected = (tuple(tokens[branches == k].tolist()) for k in range(3))
                assert (trunk + chosen[:1], chosen[1:], rejected[1:]) in made
                assert row["loss_mask"][here].sum() == len(chosen) + len(rejected) - 2


def test_a_long_prompt_keeps_the_bos_that_its_template_writes(tmp_path):
    write(tmp_path / "raw.jsonl", [rated_pair(n) for n in range(40)])
    prepare("ultrafeedback", tmp_path / "raw.jsonl", tmp_path, "binarized")
    config = config_of("demo_dpo", tmp_path, dataset="ultrafeedback/binarized")
    dpo = dataclasses.replace(config.dpo, max_length=40, max_prompt_length=8)
    config = dataclasses.replace(config, dpo=dpo)
    for kind, first in (("strict", 1), ("turns", 3 + ord("s"))):  # the last 8: "stant|>\n"
        packed = build_packed(config, JsonTokenizer(byte_level_files(kind, n_merges=0)), 1)
        info = packed.manifest["splits"]["train"]
        assert info["prompts_cut"] == info["documents"]
        rows = packed.rows("train").read(range(info["rows"]))
        begins = (rows["positions"] == 0) & (rows["segments"] > 0)
        assert set(rows["tokens"][begins].tolist()) == {first}
