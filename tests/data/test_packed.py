"""The packed set: what goes into it, what is counted, and the steps that follow from it."""

import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from raw_rows import dialogue, write
from sample_templates import TEMPLATES, byte_level_files
from sample_tokenizers import train_model

from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import documents, mixture, packing
from zephyr_jax.data.packing.batches import make_plan, read_batches
from zephyr_jax.data.packing.packed import RowSource, build_packed, packed_folder
from zephyr_jax.data.packing.remote import new_folder
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.training.optim import make_schedule, warmup_steps

N_DIALOGUES, N_LONG = 60, 20
PAIR = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}


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


def replaced(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*")}


def test_steps_are_counted_from_packed_rows(dialogues):  # pitfall 25
    config, packed = dialogues
    info = packed.manifest["splits"]["train"]
    written = len(ArrayRecordDataSource(str(packed.folder / "train.array_record")))
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


def test_rows_do_not_depend_on_the_number_of_processes(tok, dialogues, tmp_path, monkeypatch):
    config, whole = dialogues
    monkeypatch.setattr(documents, "RECORDS_PER_CHUNK", 9)
    packed = {}
    for workers in (1, 2):
        root = tmp_path / str(workers)
        shutil.copytree(Path(config.data.data_dir) / "ultrachat", root / "ultrachat")
        monkeypatch.setattr(documents, "available_cores", lambda n=workers: n)
        made = build_packed(replaced(config, data_dir=str(root)), tok, 1)
        packed[workers] = contents(made.folder)
        assert made.folder.name == whole.folder.name
    assert packed[1] == packed[2]
    assert packed[1] == contents(whole.folder)  # chunks change no row either


def test_a_set_with_missing_rows_is_refused(dialogues):
    _, whole = dialogues
    n_rows = whole.manifest["splits"]["train"]["rows"]
    with pytest.raises(ValueError, match="rows where its manifest says .*; delete the folder"):
        RowSource(whole.folder / "train.array_record", n_rows + 1, np.dtype("u1"))


class Killed(BaseException):
    """What the test raises in the middle of packing."""


def test_a_killed_run_leaves_no_set_and_the_next_one_packs_the_same(tok, dialogues, tmp_path):
    config, whole = dialogues
    shutil.copytree(Path(config.data.data_dir) / "ultrachat", tmp_path / "ultrachat")
    config = replaced(config, data_dir=str(tmp_path))
    place = Path(packed_folder(config, tok, 1))

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "build_row", killed)
        with pytest.raises(Killed):
            build_packed(config, tok, 1)
    lock, unfinished = f".{place.name}.lock", f".{place.name}.killed.tmp"
    assert [path.name for path in place.parent.iterdir()] == [lock]
    (place.parent / unfinished).mkdir()  # of a process that could not clean up
    assert contents(build_packed(config, tok, 1).folder) == contents(whole.folder)
    assert {path.name for path in place.parent.iterdir()} == {lock, place.name}


def test_the_second_process_waits_for_the_first(tmp_path):
    folder, entered, yielded = tmp_path / "set", threading.Event(), []

    def second():
        entered.set()
        with new_folder(folder) as temporary:
            yielded.append(temporary)

    with new_folder(folder) as temporary:
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(0.3)
        assert thread.is_alive()
        (temporary / "file").write_text("whole")
    thread.join(10)
    assert yielded == [None]
    assert (folder / "file").read_text() == "whole"


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_a_stream_holds_the_dialogues_end_to_end(tok, dialogues, loss_on):
    config, _ = dialogues
    chat = dataclasses.replace(config.chat, append_eos=True, loss_on=loss_on)
    data = dataclasses.replace(config.data, packing="concat", seq_len=100)
    made = build_packed(dataclasses.replace(config, chat=chat, data=data), tok, 1)
    (source,) = (member.folder for member in mixture.members(data))
    for split, name in zip(("train", "eval"), data.splits, strict=True):
        left = []
        for record in read_split(source, name):
            ids, mask = render_chat(tok, record["messages"], append_eos=True)
            assert ids[-1] == tok.eos_id
            left.append([*zip(ids, mask if loss_on == "assistant" else [1] * len(ids))])  # noqa: B905
        info = made.manifest["splits"][split]
        rows = made.rows(split).read(range(info["rows"]))
        total = sum(map(len, left))
        assert info["rows"] == total // 100
        assert info["tokens_left_over"] == total % 100
        assert info["documents"] == info["read"] == len(left)
        assert info["padding_share"] == 0
        assert (rows["segments"] == 1).all()
        assert (rows["positions"] == np.arange(100)).all()
        assert not rows["loss_mask"][:, 0].any()
        tokens, mask = rows["tokens"].reshape(-1), rows["loss_mask"].copy()
        stream = [int(token) for token in tokens]
        firsts, at = np.arange(0, len(stream), 100), 0
        while at < len(stream):
            rest = len(stream) - at
            here = next(
                d for d in left if stream[at : at + len(d)] == [token for token, _ in d][:rest]
            )
            left.remove(here)
            targets = np.asarray([m for _, m in here], bool)[: len(stream) - at]
            got = mask.reshape(-1)[at : at + len(targets)]
            inside = ~np.isin(np.arange(at, at + len(targets)), firsts)
            assert (got == (targets & inside)).all()
            at += len(here)


def test_preferences_are_no_stream(tok, dialogues):
    config, _ = dialogues
    stream = dataclasses.replace(config.data, packing="concat")
    dpo = load_config("demo_dpo").dpo
    with pytest.raises(ValueError, match="concat would cut preference pairs in two; use best_fit"):
        packed_folder(dataclasses.replace(config, data=stream, dpo=dpo), tok, 1)
    long = dataclasses.replace(config, data=dataclasses.replace(stream, seq_len=9999999))
    with pytest.raises(ValueError, match="less than one row of data.seq_len=9999999"):
        build_packed(long, tok, 1)
