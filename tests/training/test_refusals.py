"""What would ruin a run is refused, or named in a line, before its first step."""

import dataclasses
import logging
from pathlib import Path

import pytest
from conftest import with_fields
from runs import config_of, metrics_of

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.batches import make_plan
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.tokenizer_files import ModelProto
from zephyr_jax.evaluation.metrics_file import learned
from zephyr_jax.training.loop import report_learning
from zephyr_jax.training.setup import check_plan, pack, run_tokenizer, setup
from zephyr_jax.weights import gguf
from zephyr_jax.weights.exports import write_files

pytestmark = pytest.mark.usefixtures("one_device")


def plan_of(rows, kind="sft", optim=(), held_out=4, **train):
    """A recipe's plan over this many rows or pairs, checked."""
    train = {"epochs": 4, "batch_size": 32 if kind == "dpo" else 8} | train
    config = with_fields(load_config(f"demo_{kind}"), optim=dict(optim), train=train)
    split = {"rows": rows, "documents": rows, "tokens": rows * config.data.seq_len}
    manifest = {"splits": {"train": split, "eval": {"rows": held_out}}}
    if kind == "dpo":
        manifest |= {"rows_per_batch": 4, "steps_per_epoch": -(-rows // config.train.batch_size)}
    packed, train = PackedSet(Path(), manifest), config.train
    plan = make_plan(packed, train.batch_size, train.epochs, train.max_steps)
    check_plan(config, packed, plan, 1)
    return plan


STILL = {"optim": {"warmup_ratio": 0.1, "warmup_from_zero": True}, "max_steps": 1}


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (30, {"kind": "dpo"}, "batch_size=32 is more than the 30 pairs .* use .*batch_size=7"),
        (5, {}, "batch_size=8 is more than the 5 rows .*batch_size=1 and .*train.epochs=0"),
        (100, STILL, "nothing would be learned; use --config.optim.warmup"),
    ],
)
def test_a_plan_that_learns_nothing_is_refused_with_the_number_to_type(rows, words, message):
    with pytest.raises(ValueError, match=message):
        plan_of(rows, **words)
    assert plan_of(100, optim={"warmup_ratio": 0.1}, max_steps=1).train_steps == 1


def test_a_short_run_and_one_of_warm_up_alone_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        plan_of(2000)
        assert not caplog.messages
        plan_of(17)
        plan_of(2000, optim={"warmup_ratio": 1.0})
    assert "12 steps over 17 rows teach little; --config.train.epochs=0" in caplog.messages[0]
    assert "all 1000 steps are warm-up" in caplog.messages[1]


@pytest.mark.parametrize(("rows", "kind", "steps"), [(17, "sft", 102), (40, "dpo", 100)])
def test_a_small_set_is_repeated_until_there_are_100_steps(rows, kind, steps):
    assert plan_of(rows, kind, epochs=0).train_steps == steps
    assert plan_of(rows, kind, epochs=0, max_steps=3).train_steps == 3
    assert plan_of(4000, epochs=0).train_steps == 500


def test_pairs_are_packed_for_as_many_epochs_as_the_rule_gives(world, caplog):
    pack(config_of(world, "dpo", epochs=11, max_steps=1))
    config = config_of(world, "dpo", epochs=0, max_steps=0)
    packed = pack(config)
    plan = make_plan(packed, config.train.batch_size, 0, 0)
    assert 100 <= plan.train_steps < 100 + plan.steps_per_epoch
    n = packed.manifest["splits"]["train"]
    assert n["rows"] == plan.train_steps * packed.manifest["rows_per_batch"]
    assert caplog.text.count("ends the run in epoch 1 of 11: --config.train.epochs=1 packs") == 1


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("sft", {"keep_best": "loss", "eval_every": 0}, "train.eval_every .now 0. between 0 and"),
        ("sft", {"keep_best": "loss", "eval_every": 10**6}, "between 0 and the run's 52 steps"),
        ("sft", {"keep_best": "loss", "held_out": 0}, "keep_best=loss needs a held-out split"),
        ("sft", {"keep_best": "rewards/accuracies"}, "train.keep_best='rewards/accuracies' is not"),
        ("dpo", {"keep_best": "acc"}, "train.keep_best='acc' is not known; use one of loss, kl, "),
        ("dpo", {"keep_best": "up:loss"}, "train.keep_best='up' is not known; use one of , min"),
        ("dpo", {"keep_best": {"loss": 2.5}}, "must be a metric, or {'METRIC': EVALUATIONS}"),
    ],
)
def test_a_best_step_that_no_evaluation_can_find_is_refused(kind, words, message):
    with pytest.raises(ValueError, match=message):
        plan_of(100, kind, **{"eval_every": 1} | words)


def swapped(path):
    """A SentencePiece model of the same size in which two entries have changed places."""
    model = ModelProto.FromString(path.read_bytes())
    normal = [i for i, piece in enumerate(model.pieces) if piece.type == 1]
    a, b = model.pieces[normal[-1]], model.pieces[normal[-2]]
    a.piece, b.piece = b.piece, a.piece
    return model.SerializeToString()


def test_another_tokenizer_of_the_same_size_is_refused_before_packing(sft_run, tmp_path):
    first = zj.Tokenizer.from_folder(sft_run.workdir)
    (tmp_path / "tokenizer.model").write_bytes(swapped(sft_run.workdir / "tokenizer.model"))
    other = zj.Tokenizer.from_folder(tmp_path)
    assert other.vocab_size == first.vocab_size
    init, data = str(sft_run.workdir), {"tokenizer": str(tmp_path)}
    config = with_fields(sft_run.config, data=data, init=init)
    for start in (lambda: setup(config, tmp_path / "run"), lambda: pack(config)):
        with pytest.raises(ValueError, match="on purpose by --config.data.new_tokenizer=T") as info:
            start()
        assert all(tok.digest[:16] in str(info.value) for tok in (first, other))
        assert " against [" in str(info.value)
    assert not (tmp_path / "run").exists()
    run_tokenizer(dataclasses.replace(config.data, new_tokenizer=True), init)
    run_tokenizer(dataclasses.replace(config.data, tokenizer=""), init)


def test_the_same_tokenizer_in_another_file_is_the_same(sft_run, tmp_path):
    tok = zj.Tokenizer.from_folder(sft_run.workdir)
    write_files(tmp_path, sft_run.config.model, tok, "float32", {}, "name")
    (tmp_path / "tokenizer.model").unlink()
    data = dataclasses.replace(sft_run.config.data, tokenizer=str(tmp_path))
    assert run_tokenizer(data, str(sft_run.workdir)).digest != tok.digest


def test_what_could_not_be_exported_is_refused_or_named(world, tmp_path, monkeypatch, caplog):
    config = config_of(world, "sft")
    with pytest.raises(ValueError, match="the tokenizer has .*eos 2, .*tokenizer of the training"):
        setup(with_fields(config, model={"eos_token_id": 7}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def refuse(*_):
        raise ValueError("llama.cpp has no such rule")

    monkeypatch.setattr(gguf, "add_tokenizer", refuse)
    setup(config, tmp_path / "run")
    assert "cannot become a GGUF file: llama.cpp has no such rule" in caplog.text


def test_the_last_line_says_what_was_learned(sft_run, dpo_run):
    first, last = (row["eval_loss"] for row in metrics_of(sft_run.workdir, "eval"))
    text, better = learned(metrics_of(sft_run.workdir))
    assert text == f"held-out loss {first:.4f} -> {last:.4f}"
    assert better == (last < first)
    assert learned(metrics_of(sft_run.workdir, "train"))[0].startswith("training loss ")
    text, _ = learned(metrics_of(dpo_run.workdir))
    assert "loss 0.6931 -> " in text
    assert ", accuracy 0.50 -> " in text  # at first every pair is a tie
    assert not learned([{"split": "train", "loss": 1.0, "step": s} for s in (1, 2)])[1]


def test_parameters_that_did_not_move_are_named(sft_run, tmp_path, caplog):
    for folder, moved in ((sft_run.workdir, True), (tmp_path / "run", False)):
        run = setup(sft_run.config, folder)
        with caplog.at_level(logging.INFO, logger="absl"):
            report_learning(run, run.state, 0)
        assert ("bit for bit those that the run began with" in caplog.text) != moved
        assert ("10 steps done; held-out loss " in caplog.messages[-1]) == moved
