"""The command evaluate: its numbers are those of documents scored one by one in float64."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from raw_rows import write

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.demo import corpus
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.evaluate import answer_table, intervals, mean_of, summarize
from zephyr_jax.evaluation.pairs import PairTable, pair_columns, pair_means, pair_table
from zephyr_jax.evaluation.scoring import Scored, ScoreSet, pack_records, score, select_records
from zephyr_jax.weights.checkpoint import Model, save_model

CHAT = ChatConfig(True, False, False, False, "assistant", False)
OPTIONS = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}
SFT, DPO = "ultrachat/raw", "ultrafeedback/raw"
SPLITS = {SFT: "test_sft", DPO: "train_prefs"}  # of the little world only two pairs are held out
# Dialogues, prompts and answers are cut.
MAX_LENGTH, MAX_PROMPT, SEQ_LEN = 40, 25, 96
RENDERINGS = {SFT: Rendering(CHAT, False, MAX_LENGTH)}
RENDERINGS[DPO] = Rendering(CHAT, True, MAX_LENGTH, MAX_PROMPT)


@pytest.fixture(scope="module")
def models(world):
    """Two random models with much to say."""
    sizes = {"vocab_size": 400, "num_hidden_layers": 2, "initializer_range": 0.2}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), **sizes)
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    return [Model(cfg, zj.init_params(cfg, jax.random.key(i)), tok, {}) for i in (0, 1)]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Checkpoints: b's run had a second </s>, shuffled has other tokens."""
    model, second = models
    root = tmp_path_factory.mktemp("models")
    chat = {"chat": dataclasses.asdict(CHAT) | {"append_eos": True}}
    corpus.write_ultrachat(root / "u", 30, 5)
    lines = [line[::-1] for line in corpus.tokenizer_lines(root / "u")]
    corpus.train_tokenizer(lines, root / "tokenizer.model", 400)
    shuffled = model._replace(tokenizer=zj.Tokenizer.from_file(root / "tokenizer.model"))
    save_model(model, root / "a")
    save_model(second._replace(lineage={"config": chat}), root / "b")
    save_model(shuffled, root / "shuffled")
    return root


def packed(world, tok, dataset, seq_len=SEQ_LEN):
    sets = select_records(str(world / "data"), dataset, SPLITS[dataset])
    return pack_records(sets, tok, RENDERINGS[dataset], seq_len)


@pytest.fixture(scope="module")
def pairs(world, models):
    """The packed pairs, and their scores under both models."""
    documents = packed(world, models[0].tokenizer, DPO)
    return documents, score(documents, models, 5)


def alone(model, sequences, masks, length=MAX_LENGTH):
    """Log-probs, masks and what is likeliest of sequences, each in a row of its own, float64."""
    tokens = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, (ids, targets) in enumerate(zip(sequences, masks, strict=True)):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, targets
    logits = jax.jit(zj.forward, static_argnums=0)(model.cfg, model.params, tokens)
    logits = np.asarray(logits, np.float64)[:, :-1]
    each = logits - np.logaddexp.reduce(logits, axis=-1)[..., None]
    logps = np.take_along_axis(each, tokens[:, 1:, None], axis=-1)[..., 0] * mask[:, 1:]
    return logps, mask, logits.argmax(axis=-1) == tokens[:, 1:]


def scored_dialogues(world, models):
    """Log-probs and masks of the dialogues, scored one by one."""
    documents = []
    for record in read_split(world / "data" / SFT / "1.1.0", SPLITS[SFT]):
        ids, mask = render_chat(models[0].tokenizer, record["messages"], **OPTIONS)
        documents.append(packing.dialogue_document(ids, mask, MAX_LENGTH))
    documents = [x for x in documents if len(x.tokens)]
    assert max(len(x.tokens) for x in documents) == MAX_LENGTH
    return alone(models[0], [x.tokens for x in documents], [x.loss_mask for x in documents])[:2]


def test_pairs_are_scored_as_if_alone(world, models, pairs):
    sequences, masks = [], []
    for record in read_split(world / "data" / DPO / "1.1.0", SPLITS[DPO]):
        answers = [record[side][-1]["content"] for side in ("chosen", "rejected")]
        whole = render_pair(models[0].tokenizer, record["chosen"][:-1], *answers, **OPTIONS)
        prompt, *cut = packing.cut_pair(*whole, MAX_LENGTH, MAX_PROMPT, True)
        sequences += [[*prompt, *answer] for answer in cut]
        masks += [[0] * len(prompt) + [1] * len(answer) for answer in cut]
    logps, mask, _ = alone(models[0], sequences, masks)
    ref_logps = alone(models[1], sequences, masks)[0]
    documents, scores = pairs
    for ours, theirs in (
        (scores.logps, logps.sum(axis=1)),
        (scores.ref_logps, ref_logps.sum(axis=1)),
        (scores.tokens, mask.sum(axis=1)),
    ):
        np.testing.assert_allclose(ours[:, 1:], theirs.reshape(-1, 2), rtol=1e-5)
        assert not ours[:, 0].any()
    np.testing.assert_allclose(score(documents, models[:1], 5).logps, scores.logps, rtol=1e-5)


def test_rows_packing_and_mesh_change_nothing(world, models, pairs):
    cfg, tok = models[0].cfg, models[0].tokenizer
    other = [score(packed(world, tok, DPO, 160), models, 3)]
    with jax.set_mesh(zj.make_mesh(2, 2, 2)):
        there = [Model(cfg, zj.init_params(cfg, jax.random.key(i)), tok, {}) for i in (0, 1)]
        other.append(score(pairs[0], there, 4))
    for scores in other:
        for name, ours in scores._asdict().items():
            np.testing.assert_allclose(ours, getattr(pairs[1], name), rtol=1e-5, err_msg=name)


def test_numbers_are_those_of_training_with_intervals_around_them(pairs):
    documents, scored = pairs
    result = summarize(scored, documents, 0.3)
    numbers, sources = result["numbers"], result["sources"]
    for name, value in pair_means(answer_table(scored, 0.3), 0.3).items():
        assert numbers[name]["value"] == pytest.approx(value, rel=1e-12)
        assert numbers[name]["low"] <= value <= numbers[name]["high"]
    margins = 0.3 * ((scored.logps - scored.ref_logps) @ [0, 1, -1])
    assert numbers["loss"]["value"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    total = scored.logps[:, 1].sum() / scored.tokens[:, 1].sum()
    assert numbers["perplexity/chosen"]["value"] == pytest.approx(np.exp(-total))
    assert len(sources) > 1
    counts = [own["documents"] for own in sources.values()]
    assert sum(counts) == result["counts"]["pairs"] == len(margins)
    own = [own["numbers"]["rewards/margins"]["value"] for own in sources.values()]
    assert np.dot(own, counts) == pytest.approx(margins.sum())


def test_pairs_of_one_prompt_are_drawn_together():
    rng, prompts = np.random.default_rng(0), np.repeat(np.arange(5), 4)
    lengths = rng.integers([1, 1, 30], [2, 5, 40], (20, 3)) * 1.0
    scored = Scored(rng.normal(size=(5, 1))[prompts] + rng.normal(size=(20, 3)) - 9, lengths)
    documents = ScoreSet([], [], np.full(20, "own"), prompts, True, SEQ_LEN, {})
    result = summarize(scored, documents, 0.1)
    numbers = result["numbers"]
    assert (result["counts"]["prompts"], result["sources"]) == (5, {})
    assert "rewards/margins" not in numbers
    mean = {"x": mean_of(scored.logps[:, 1])}
    assert numbers["logps/chosen"] == pytest.approx(intervals(mean, prompts)["x"])
    each = scored.logps[:, 1:] / scored.tokens[:, 1:]
    share = numbers["logps/accuracies_per_token"]["value"]
    assert share == pytest.approx((each[:, 0] > each[:, 1]).mean())
    assert share != numbers["logps/accuracies"]["value"]


def test_a_tie_is_decided_on_tokens_whatever_rounding_says(models, tmp_path, monkeypatch):
    """Of four pairs two are equal after the cut; branches are rounded apart on purpose."""
    words = "lorn sun name rule word " * 20
    rows = [
        {"prompt": f"{n}?", "chosen": f"{n % 2 * 'x'}{words}a", "rejected": f"{words}b"}
        for n in range(4)
    ]
    prepare("preferences", write(tmp_path / "own.jsonl", rows * 20), tmp_path)
    compute = scoring.program(scoring._score)

    def rounded(cfg, params, rows, branched):
        apart = np.where(rows.branches == 2, np.where(rows.segments % 2, 1e-5, -1e-5), 0)
        return compute(cfg, params, rows, branched) + np.where(rows.loss_mask, apart, 0)

    monkeypatch.setattr(scoring, "program", lambda _: rounded)
    for both in (models[:1], models):
        sets = select_records(str(tmp_path), "preferences/own", "train_prefs")
        documents = pack_records(sets, models[0].tokenizer, RENDERINGS[DPO], SEQ_LEN)
        scored = score(documents, both, 4)
        same = np.array([document.equal for document in documents.documents])
        assert documents.counts["equal_after_cut"] == same.sum() > 0
        numbers = summarize(scored, documents, 0.3)["numbers"]
        for name in ("logps/ties", "logps/ties_per_token", "rewards/ties")[: 1 + len(both)]:
            assert numbers[name]["value"] == same.mean() < 1
        table = answer_table(scored, 0.3)
        np.testing.assert_array_equal(table.logps[same, 0], table.logps[same, 1])
        np.testing.assert_array_equal(table.ref_logps[same, 0], table.ref_logps[same, 1])


def test_held_out_pairs_of_equal_tokens_have_a_margin_of_exactly_zero():
    rng, ids = np.random.default_rng(0), np.array([[5, 6, 0], [7, 8, 9]])
    logps, refs = rng.normal(-9, 1, (2, 2, 3, 2)).astype(np.float32)
    batch = PairTable(ids, logps[..., 0], logps, refs, np.ones((2, 3, 2)))
    table = pair_table([batch], np.array([6, 9, 1234]))
    columns, tie = pair_columns(table, 0.3), np.array([False, True, False, False, True])
    np.testing.assert_array_equal(columns["rewards/margins"] == 0, tie)
    assert not (columns["rewards/accuracies"] & tie).any()


def test_scores_that_are_not_finite_or_of_unknown_tokens_are_no_result(models, pairs, monkeypatch):
    small = models[0]._replace(cfg=dataclasses.replace(models[0].cfg, vocab_size=9))
    with pytest.raises(ValueError, match=r"token id \d+, the model ids 0 to 8"):
        score(pairs[0], [small], 5)
    monkeypatch.setattr(scoring, "program", lambda _: lambda *_: np.full((5, SEQ_LEN), np.nan))
    with pytest.raises(FloatingPointError, match="have no finite log-prob"):
        score(pairs[0], models[:1], 5)


def test_the_first_records_of_several_sets(world, models, tmp_path):
    rows = [{"prompt": f"is it {i // 2}?", "chosen": f"a{i}", "rejected": "no"} for i in range(4)]
    prepare("preferences", write(tmp_path / "own.jsonl", rows), tmp_path, "mine")
    prepare("ultrafeedback", world / "raw" / "ultrafeedback", tmp_path, "raw")
    sets = select_records(str(tmp_path), f"{DPO}, preferences/mine", "train_prefs", limit=2)
    documents = pack_records(sets, models[0].tokenizer, RENDERINGS[DPO], SEQ_LEN)
    assert documents.counts["read"] == len(documents.documents) == 4
    assert documents.sources.tolist()[2:] == ["preferences/mine"] * 2
    assert len(np.unique(documents.prompts)) == 3


def test_the_command_prints_perplexity(world, models, folders, capsys):
    words = f"--model={folders / 'a'}", f"--data_dir={world / 'data'}", f"--dataset={SFT}"
    main(["evaluate", "sets", *words, f"--seq_len={SEQ_LEN}", f"--max_length={MAX_LENGTH}"])
    *table, last = capsys.readouterr().out.splitlines()
    result, (logps, mask) = json.loads(last), scored_dialogues(world, models)
    nll = -logps.sum() / mask.sum()
    metrics = result["numbers"]
    assert metrics["perplexity"]["value"] == pytest.approx(np.exp(nll), rel=1e-4)
    assert metrics["perplexity"]["low"] < np.exp(nll) < metrics["perplexity"]["high"]
    each = (-logps.sum(axis=1) / mask.sum(axis=1)).mean()
    assert metrics["nll/per_dialogue"]["value"] == pytest.approx(each, rel=1e-5)
    assert result["counts"] == {"dialogues": len(mask), "target_tokens": mask.sum()}
    assert result["kind"] == "dialogues"
    assert (result["max_length"], result["chat_of"]) == (MAX_LENGTH, "the project's default")
    assert "loss_on assistant" in "\n".join(table)


def test_a_model_with_itself_as_reference_is_a_tie(world, folders, capsys, tmp_path):
    output = tmp_path / "result.json"
    words = f"--model={folders}/b --reference={folders}/b --data_dir={world}/data --dataset={DPO}"
    words += f" --split={SPLITS[DPO]} --seq_len=192 --fsdp=2 --tensor=2 --beta=0.3"
    main(["evaluate", "sets", *words.split(), f"--output={output}"])
    table, result = capsys.readouterr().out, json.loads(output.read_text())
    ties = dict.fromkeys(("rewards/accuracies", "rewards/margins", "kl"), 0)
    for name, value in {**ties, "rewards/ties": 1, "loss": np.log(2)}.items():
        assert tuple(result["numbers"][name].values()) == pytest.approx([value] * 3, abs=1e-12)
    assert 0 < result["numbers"]["logps/accuracies"]["value"] < 1
    assert (result["beta"], result["max_length"], result["max_prompt_length"]) == (0.3, 96, 48)
    assert result["chat"]["append_eos"]
    assert result["chat_of"] == "the model's own run"
    assert "rewards/accuracies by source" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset=ultrachat/200k", "no prepared set in"),
        (f"--dataset={SFT} --split=dev", "has no split 'dev'"),
        (f"--dataset={SFT} --reference=ROOT/a", "is for pairs; ultrachat/raw has dialogue"),
        (f"--dataset={SFT},{DPO}", "mixes dialogues and pairs"),
        (f"--dataset={DPO} --reference=ROOT/shuffled", "has another vocabulary (400 logits"),
        (f"--dataset={DPO} --reference=ROOT/a --beta=0", "beta=0.0 must be above 0"),
        (f"--dataset={DPO} --beta=0.1", "give --reference too"),
        (f"--dataset={SFT} --max_length=513", "--max_length=513 is over 512, the lesser of"),
        (f"--dataset={SFT} --max_length=2", "no record of ultrachat/raw test_sft can be"),
    ],
)
def test_bad_input_ends_in_one_line(words, message, world, folders, refused):
    words = [f"--model={folders / 'a'}", *words.replace("ROOT", str(folders)).split()]
    assert message in refused("evaluate", "sets", f"--data_dir={world / 'data'}", *words)
