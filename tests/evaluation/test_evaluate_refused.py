"""The command evaluate: wrong input ends in one line."""

import dataclasses
from pathlib import Path

import jax
import pytest

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.demo import corpus, vocabulary
from zephyr_jax.evaluation import documents
from zephyr_jax.weights.checkpoint import Model, save_model

SFT, DPO = "ultrachat/raw", "ultrafeedback/raw"


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """A small model, one with a larger vocabulary, and one with other tokens."""
    root = tmp_path_factory.mktemp("models")
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400)
    wider = dataclasses.replace(cfg, vocab_size=402)
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    other = _another(root)
    for name, own, vocab in (("a", cfg, tok), ("other", wider, tok), ("shuffled", cfg, other)):
        params = zj.init_params(own, jax.random.key(0))
        save_model(Model(own, params, vocab, {}), root / name)
    return root


def _another(folder: Path) -> zj.Tokenizer:
    """A tokenizer with as many tokens, which are others."""
    corpus.write_ultrachat(folder / "u", 30, 5)
    lines = [line[::-1] for line in vocabulary.tokenizer_lines(folder / "u")]
    vocabulary.train_tokenizer(lines, folder / "tokenizer.model", 400)
    return zj.Tokenizer.from_file(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset=ultrachat/200k"], "no prepared set in"),
        ([f"--dataset={SFT}", "--split=dev"], "has no split 'dev'"),
        ([f"--dataset={SFT}", "--reference={a}"], "is for pairs; ultrachat/raw has dialogue"),
        ([f"--dataset={SFT}", "--max_prompt_length=9"], "is for pairs"),
        ([f"--dataset={SFT}, {DPO}"], "mixes dialogues and pairs"),
        ([f"--dataset={DPO}", "--reference={other}"], "has another vocabulary (402 logits, 400"),
        ([f"--dataset={DPO}", "--reference={shuffled}"], "has another vocabulary (400 logits"),
        ([f"--dataset={DPO}", "--reference={a}", "--beta=0"], "--beta=0.0 must be a number above"),
        ([f"--dataset={DPO}", "--beta=0.1"], "give --reference=MODEL too"),
        ([f"--dataset={SFT}", "--limit=0"], "--limit=0 must be at least 1"),
        ([f"--dataset={SFT}", "--rows=9"], "--rows=9 is not divisible by data x fsdp = 8; use 16"),
        ([f"--dataset={SFT}", "--rows=0"], "--rows=0 must be at least 1"),
        ([f"--dataset={SFT}", "--tensor=3"], "must divide the 8 devices"),
        ([f"--dataset={SFT}", "--seq_len=1"], "--seq_len=1 must be at least 2"),
        ([f"--dataset={SFT}", "--max_length=513"], "over the 512 positions"),
        ([f"--dataset={SFT}", "--seq_len=64", "--max_length=65"], "does not fit into --seq_len=64"),
        ([f"--dataset={DPO}", "--max_length=64", "--max_prompt_length=64"], "leaves no room"),
        ([f"--dataset={SFT}", "--max_length=2"], "no record of ultrachat/raw test_sft can be"),
        ([f"--dataset={SFT}", "--bootstrap=10"], "--bootstrap=10 must be at least 100"),
        (
            [f"--dataset={SFT}", "--output=/nowhere/x.json"],
            "must name a file in an existing folder",
        ),
        ([f"--dataset={SFT}", "--output={a}"], "must name a file in an existing folder"),
        ([f"--dataset={SFT}", "--model=nowhere"], "nowhere is not a model"),
    ],
)
def test_bad_input_ends_in_one_line(words, message, world, folders, capsys):
    places = {name: folders / name for name in ("a", "other", "shuffled")}
    words = [word.format(**places) for word in words]
    if not any(word.startswith("--model") for word in words):
        words.append(f"--model={folders / 'a'}")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", f"--data_dir={world / 'data'}", *words])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    (line,) = (x for x in err.splitlines() if x.startswith("error: "))
    assert message in line
    assert not out


def test_an_empty_split_is_refused(world, monkeypatch):
    monkeypatch.setattr(documents.prepare, "read_split", lambda *_: [])
    with pytest.raises(ValueError, match="split test_sft of ultrachat/raw is empty"):
        documents.select_records(str(world / "data"), SFT)
