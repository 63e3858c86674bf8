"""The packed set: what goes into it, what is counted, and the steps that follow from it."""

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import runs
from array_record.python.array_record_data_source import ArrayRecordDataSource
from buckets import stand_in
from conftest import with_fields
from raw_rows import dialogue, write
from sample_templates import TEMPLATES, byte_level_files
from test_chat import OURS, chat

from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing import documents, packing
from zephyr_jax.data.packing.batches import make_plan, read_batches
from zephyr_jax.data.packing.packed import build_packed, open_packed, packed_folder
from zephyr_jax.data.prepare.prepare import Selection, prepare, read_split
from zephyr_jax.data.raw.schema import prompt_digest
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.training.optim import make_schedule, warmup_steps
from zephyr_jax.training.setup import pack

N_DIALOGUES, N_LONG, N_PAIRS = 60, 20, 60


def config_of(recipe, folder, **data):
    return with_fields(load_config(recipe), data={"data_dir": str(folder)} | data)


def copied(config, root):
    """The recipe of dialogues on a copy of its prepared set, without the packed one."""
    shutil.copytree(Path(config.data.data_dir) / "ultrachat", root / "ultrachat")
    return with_fields(config, data={"data_dir": str(root)})


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*")}


def rows_of(packed, split):
    return packed.rows(split).read(range(packed.manifest["splits"][split]["rows"]))


def documents_of(packed, split):
    """The tokens, branches and loss mask of every document in the rows of a split."""
    for row in rows_of(packed, split):
        assert not row["tokens"][row["segments"] == 0].any()
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            yield row["tokens"][here], row["branches"][here], row["loss_mask"][here]


@pytest.fixture(scope="module")
def dialogues(toy, tmp_path_factory):
    """A set of dialogues, of which some have a question that leaves no room for the answer."""
    root = tmp_path_factory.mktemp("dialogues")
    long = [{"id": f"l{i}", "data": [f"why {i}? " * 200, "So."]} for i in range(N_LONG)]
    write(root / "raw" / "train.jsonl", [*map(dialogue, range(N_DIALOGUES)), *long])
    prepare("ultrachat", root / "raw", root)
    config = config_of("demo_sft", root)
    return config, build_packed(config, toy)


def rated_pair(n):
    texts = f"first {n}? <|im_end|></s>", "an answer", "second"
    chosen, rejected = chat(*texts, f"\n\ngood {n}"), chat(*texts, f"bad </s> {n}")
    row = {"prompt": texts[0], "prompt_id": prompt_digest(texts[0]), "messages": chosen}
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return row | {"chosen": chosen, "rejected": rejected} | scores


def prepared_pairs(folder):
    """The demo's DPO recipe on a set of pairs."""
    write(folder / "raw.jsonl", map(rated_pair, range(N_PAIRS)))
    prepare("ultrafeedback", folder / "raw.jsonl", folder, "binarized")
    return config_of("demo_dpo", folder, dataset="ultrafeedback/binarized")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return prepared_pairs(tmp_path_factory.mktemp("pairs"))


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
    for split in packed.manifest["splits"]:
        assert all(mask.any() for _, _, mask in documents_of(packed, split))


def test_the_conversation_is_the_turns_and_not_the_prompt_column(toy, pairs):  # pitfall 12
    packed = build_packed(pairs, toy)
    shared = [toy.decode(t[branches == 0]) for t, branches, _ in documents_of(packed, "eval")]
    for text in shared:
        assert [text.count(part) for part in ("first", "an answer", "second")] == [1, 1, 1]
    assert len(shared) == packed.manifest["splits"]["eval"]["documents"] > 0
    assert np.count_nonzero(rows_of(packed, "eval")["pair_ids"]) == len(shared)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_documents_are_the_rendered_dialogues(kind, dialogues, tmp_path):
    config, _ = dialogues
    tok = Tokenizer.from_file(JsonTokenizer(byte_level_files(kind)).save(tmp_path / "tok"))
    packed = build_packed(config, tok)
    assert packed.manifest["made_from"]["tokenizer"] == tok.digest
    (member,) = documents.members(config.data)
    for split, name in zip(("train", "eval"), config.data.splits, strict=True):
        expected = []
        for record in read_split(member.folder, name):
            ids, mask = render_chat(tok, record["messages"])
            document = packing.dialogue_document(ids, mask, config.data.seq_len)
            expected.append((document.tokens.tolist(), document.loss_mask.tolist()))
        found = [(t.tolist(), mask.tolist()) for t, _, mask in documents_of(packed, split)]
        assert sorted(found) == sorted(document for document in expected if document[0])


@pytest.mark.parametrize("kind", [*TEMPLATES, "zephyr"])
def test_documents_are_the_rendered_pairs(kind, pairs, toy):
    tok = toy if kind == "zephyr" else JsonTokenizer(byte_level_files(kind))
    options = OURS | {"score_header": kind == "zephyr"}
    packed = build_packed(with_fields(pairs, chat=options), tok)
    expected = set()
    for row in map(rated_pair, range(N_PAIRS)):
        answers = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        pair = render_pair(tok, row["chosen"][:-1], *answers, **options)
        expected.add(tuple(map(tuple, pair)))
    found = set()
    for split in packed.manifest["splits"]:
        for tokens, branches, mask in documents_of(packed, split):
            shared, chosen, rejected = (tuple(tokens[branches == k].tolist()) for k in range(3))
            found.add((shared + chosen[:1], chosen[1:], rejected[1:]))
            assert mask.sum() == len(chosen) + len(rejected) - 2
    assert found == expected


def test_a_refused_record_is_named(tmp_path, monkeypatch):
    """One system turn in 12 under a template that refuses it, found by one of two processes."""
    rows = [{"messages": chat(f"first {n}?", "yes")} for n in range(12)]
    rows[7]["messages"] = [{"role": "system", "content": "Be brief."}, *rows[7]["messages"]]
    write(tmp_path / "mine.jsonl", rows)
    prepare("messages", tmp_path / "mine.jsonl", tmp_path, selection=Selection(holdout=0))
    monkeypatch.setattr(documents, "RECORDS_PER_CHUNK", 5)
    monkeypatch.setattr(documents, "available_cores", lambda: 2)
    config = config_of("demo_sft", tmp_path, dataset="messages/own", splits=("train_sft", ""))
    refusal = rf"messages/own/1.1.0 train_sft, record 7 \(prompt_id {prompt_digest('first 7?')}, "
    with pytest.raises(ValueError, match=refusal + r"'first 7\?'\): .*roles must") as stop:
        build_packed(config, JsonTokenizer(byte_level_files("strict")))
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.glob("packed/sft-*"))


def test_pairs_equal_after_the_cut_are_dropped_in_training_and_ties_held_out(toy, tmp_path):
    """Answers that differ behind the cut alone: half of all, and half of those held out."""

    def long_pair(n):
        row = rated_pair(n)
        for side in ("chosen", "rejected"):
            same = f"{n} ".ljust(90, "x")
            row[side] = chat("why?", same + (side if n % 2 else "!" * 20) + side)
        return row | {"prompt": f"why {n}?", "prompt_id": prompt_digest(f"why {n}?")}

    write(tmp_path / "raw.jsonl", map(long_pair, range(N_PAIRS)))
    prepare("ultrafeedback", tmp_path / "raw.jsonl", tmp_path, "binarized")
    config = config_of("demo_dpo", tmp_path, dataset="ultrafeedback/binarized", seq_len=512)
    n_shared = len(render_pair(toy, chat("why?"), "", "", **OURS).prompt)
    n_answer = len(render_pair(toy, chat("why?"), "0 ".ljust(90, "x"), "", **OURS).chosen) + 3
    lengths = {"max_length": n_shared + n_answer, "max_prompt_length": n_shared}
    packed = build_packed(with_fields(config, dpo=lengths), toy)
    train, held_out = packed.manifest["splits"].values()
    same = {"train": [], "eval": []}
    for split, equal in same.items():
        for tokens, branches, _ in documents_of(packed, split):
            equal.append(np.array_equal(tokens[branches == 1], tokens[branches == 2]))
    assert train["answers_cut"] == train["read"]
    assert train["dropped_equal_after_cut"] == train["read"] - train["documents"] > 20
    assert not any(same["train"])
    assert held_out["documents"] == held_out["read"]
    assert held_out["equal_after_cut"] == sum(same["eval"]) == len(packed.ties("eval"))
    assert 0 < sum(same["eval"]) < held_out["read"]
    ids = packed.pair_ids("eval")
    assert sorted(ids[ids != 0][same["eval"]]) == sorted(packed.ties("eval"))
    assert not len(packed.ties("train"))


def test_a_long_prompt_keeps_the_bos_that_its_template_writes(pairs):
    config = with_fields(pairs, dpo={"max_length": 40, "max_prompt_length": 8})
    for kind, first in (("strict", 1), ("turns", 3 + ord("s"))):  # the last 8: "stant|>\n"
        packed = build_packed(config, JsonTokenizer(byte_level_files(kind, n_merges=0)))
        info = packed.manifest["splits"]["train"]
        assert info["prompts_cut"] == info["documents"]
        assert {int(tokens[0]) for tokens, _, _ in documents_of(packed, "train")} == {first}


def test_rows_do_not_depend_on_the_number_of_processes(toy, dialogues, tmp_path, monkeypatch):
    config, whole = dialogues
    monkeypatch.setattr(documents, "RECORDS_PER_CHUNK", 9)
    for workers in (1, 2):
        monkeypatch.setattr(documents, "available_cores", lambda n=workers: n)
        packed = build_packed(copied(config, tmp_path / str(workers)), toy)
        assert packed.folder.name == whole.folder.name
        assert contents(packed.folder) == contents(whole.folder)  # chunks change no row either


def test_a_killed_run_leaves_no_set_and_the_next_one_packs_the_same(toy, dialogues, tmp_path):
    config, whole = copied(dialogues[0], tmp_path), dialogues[1]
    place = Path(packed_folder(config, toy))
    killed = mock.patch.object(packing, "build_row", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        build_packed(config, toy)
    assert not place.parent.exists()
    unfinished = place.parent / "unfinished" / place.name  # of a process that could not clean up
    unfinished.mkdir(parents=True)
    assert contents(build_packed(config, toy).folder) == contents(whole.folder)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_a_stream_holds_the_dialogues_end_to_end(toy, dialogues, loss_on):
    data, chat = {"packing": "concat", "seq_len": 100}, {"append_eos": True, "loss_on": loss_on}
    config = with_fields(dialogues[0], data=data, chat=chat)
    packed = build_packed(config, toy)
    (member,) = documents.members(config.data)
    for split, name in zip(("train", "eval"), config.data.splits, strict=True):
        streams = []
        for record in read_split(member.folder, name):
            ids, mask = render_chat(toy, record["messages"], append_eos=True)
            assert ids[-1] == toy.eos_id
            streams.append(np.array([ids, mask if loss_on == "assistant" else [1] * len(ids)]))
        plan, skips = packing.cut_stream([s.shape[1] for s in streams], 100, config.seed)
        expected = np.stack([
            np.concatenate([streams[i] for i in row], axis=1)[:, skip : skip + 100]
            for row, skip in zip(plan, skips, strict=True)
        ])  # fmt: skip
        expected[:, 1, 0] = 0  # nothing predicts the first token of a row
        info, rows = packed.manifest["splits"][split], rows_of(packed, split)
        assert info["tokens_left_over"] == sum(s.shape[1] for s in streams) - 100 * info["rows"]
        assert info["documents"] == info["read"] == len(streams)
        assert info["padding_share"] == 0
        assert (rows["tokens"] == expected[:, 0]).all()
        assert (rows["loss_mask"] == expected[:, 1]).all()
        assert (rows["segments"] == 1).all()
        assert (rows["positions"] == np.arange(100)).all()


def test_preferences_are_no_stream(toy, dialogues):
    model, dpo = {"max_position_embeddings": 10**7}, load_config("demo_dpo").dpo
    config = with_fields(dialogues[0], data={"packing": "concat"}, model=model)
    with pytest.raises(ValueError, match="data.packing=concat must be best_fit"):
        packed_folder(dataclasses.replace(config, dpo=dpo), toy)
    with pytest.raises(ValueError, match="fill no row of data.seq_len=9999999"):
        build_packed(with_fields(config, data={"seq_len": 9999999}), toy)


def test_rows_that_are_damaged_after_the_start_are_named(dialogues, tmp_path):
    folder = shutil.copytree(dialogues[1].folder, tmp_path / "packed")
    packed = dataclasses.replace(dialogues[1], folder=folder)
    path = packed.folder / "train.array_record"
    content, rows = bytearray(path.read_bytes()), packed.rows("train")
    content[1000::97] = bytes(x ^ 1 for x in content[1000::97])
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"{path}: .*; remove {packed.folder}, which the next run"):
        rows.read(range(packed.manifest["splits"]["train"]["rows"]))


def test_a_set_in_a_bucket_is_copied_once(world, monkeypatch, tmp_path):
    here, opened = tmp_path / "bucket", []
    here.mkdir()
    stand_in(monkeypatch, here, opened)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tok = Tokenizer.from_folder(world / "tokenizer")
    config = runs.config_of(world, "sft")
    local = pack(config)
    copy = tmp_path / "cache" / "zephyr_jax" / "packed" / local.folder.name
    far = with_fields(config, data={"data_dir": "gs://bucket/data"})
    shutil.copytree(Path(config.data.data_dir) / "ultrachat", here / "data" / "ultrachat")
    assert open_packed(far, tok) is None
    with pytest.raises(ValueError, match="packing needs a local data_dir; pack there with"):
        build_packed(far, tok)
    there = here / "data" / "packed" / local.folder.name
    shutil.copytree(local.folder, there)
    # a copy that went wrong appears nowhere
    name = "train.array_record"
    content = (there / name).read_bytes()
    (there / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged .*: copy the packed set to gs://"):
        open_packed(far, tok)
    assert not copy.exists()
    (there / name).write_bytes(content)
    made = open_packed(far, tok)
    assert made.home == f"gs://bucket/data/packed/{local.folder.name}"
    assert made.folder == copy
    assert contents(made.folder) == contents(local.folder)
    opened.clear()
    assert open_packed(far, tok) == made
    assert not [path for path in opened if "array_record" in path]
