"""The command evaluate: the numbers of documents scored one by one, whatever the rows and mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.prepare.prepare import prepare, read_split
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.bootstrap import intervals, mean_of
from zephyr_jax.evaluation.documents import Limits, pack_records, select_records
from zephyr_jax.evaluation.pairs import pair_means
from zephyr_jax.evaluation.scoring import Scorer, score
from zephyr_jax.evaluation.summary import Resampling, answer_table, summarize
from zephyr_jax.weights.checkpoint import Model, save_model

CHAT = ChatConfig(True, False, False, False, "assistant", False)
OPTIONS = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}
SFT, DPO = "ultrachat/raw", "ultrafeedback/raw"
SPLITS = {SFT: "test_sft", DPO: "train_prefs"}  # of the little world only two pairs are held out
CUT = Limits(96, 40, 25)  # so that dialogues, prompts and answers are cut


@pytest.fixture(scope="module")
def models(world):
    """Two random models with much to say, and their tokenizer."""
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400, initializer_range=0.2)
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    return cfg, tok, [zj.init_params(cfg, jax.random.key(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Both as checkpoints; the second is of a run with a second </s>."""
    cfg, tok, params = models
    root = tmp_path_factory.mktemp("models")
    chat = {"chat": dataclasses.asdict(CHAT) | {"append_eos": True}}
    for name, each, lineage in zip("ab", params, ({}, {"config": chat}), strict=True):
        save_model(Model(cfg, each, tok, lineage), root / name)
    return root


def scored(world, models, dataset, n_rows, limits=CUT, referred=False):
    cfg, tok, _ = models
    selected = select_records(str(world / "data"), dataset, SPLITS[dataset])
    # Initialized each time: on one mesh here, on another there.
    scorers = [Scorer(cfg, zj.init_params(cfg, jax.random.key(i))) for i in range(1 + referred)]
    return score(pack_records(selected, tok, CHAT, limits), scorers, n_rows)


def mesh_of(*sizes):
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    names = ("data", "fsdp", "tensor")
    return jax.set_mesh(jax.sharding.Mesh(devices, names, axis_types=explicit))


def alone(cfg, params, sequences, masks):
    """Logits and log-probs of sequences, each in a row of its own, float64."""
    width = max(map(len, sequences))
    tokens = np.zeros((len(sequences), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, (ids, targets) in enumerate(zip(sequences, masks, strict=True)):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, targets
    logits = zj.forward(cfg, params, tokens)
    logps = np.asarray(zj.token_logps(logits, tokens, mask), np.float64)
    return np.asarray(logits, np.float64), logps, mask


def dialogues_alone(world, models, max_length):
    _, tok, _ = models
    documents = []
    for record in read_split(world / "data" / SFT / "1.0.0", "test_sft"):
        ids, mask = render_chat(tok, record["messages"], **OPTIONS)
        documents.append(packing.dialogue_document(ids, mask, max_length))
    return [x for x in documents if len(x.tokens)]


def test_dialogues_are_scored_as_if_alone(world, models):
    cfg, _, params = models
    documents = dialogues_alone(world, models, CUT.max_length)
    sequences, masks = [x.tokens for x in documents], [x.loss_mask for x in documents]
    _, logps, mask = alone(cfg, params[0], sequences, masks)
    scores = scored(world, models, SFT, 5)
    np.testing.assert_allclose(scores.logps[:, 0], logps.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(scores.tokens[:, 0], mask.sum(axis=1))
    assert max(map(len, sequences)) == CUT.max_length
    assert not scores.logps[:, 1:].any()


def test_pairs_are_scored_as_if_alone_and_kl_is_over_the_vocabulary(world, models):
    cfg, tok, params = models
    sequences, masks = [], []
    for record in read_split(world / "data" / DPO / "1.0.0", SPLITS[DPO]):
        answers = [record[side][-1]["content"] for side in ("chosen", "rejected")]
        whole = render_pair(tok, record["chosen"][:-1], *answers, **OPTIONS)
        prompt, *cut = packing.cut_pair(*whole, CUT.max_length, CUT.max_prompt_length, True)
        sequences += [[*prompt, *answer] for answer in cut]
        masks += [[0] * len(prompt) + [1] * len(answer) for answer in cut]
    logits, logps, mask = alone(cfg, params[0], sequences, masks)
    ref_logits, ref_logps, _ = alone(cfg, params[1], sequences, masks)
    logp, logr = (x - np.logaddexp.reduce(x, axis=-1)[..., None] for x in (logits, ref_logits))
    kl = (np.exp(logp) * (logp - logr)).sum(axis=-1)[:, :-1]
    kl = np.where(mask[:, 1:], kl, 0.0).sum(axis=1)
    scores = scored(world, models, DPO, 5, referred=True)
    for ours, theirs in (
        (scores.logps, logps.sum(axis=1)),
        (scores.ref_logps, ref_logps.sum(axis=1)),
        (scores.tokens, mask.sum(axis=1)),
        (scores.kl, kl),
    ):
        np.testing.assert_allclose(ours[:, 1:], theirs.reshape(-1, 2), rtol=1e-5)
        assert not ours[:, 0].any()
    assert (kl > 0).all()
    np.testing.assert_allclose(scored(world, models, DPO, 5).logps, scores.logps, rtol=1e-5)


@pytest.mark.parametrize("dataset", [pytest.param(SFT, marks=pytest.mark.slow), DPO])
def test_rows_packing_and_mesh_change_nothing(world, models, dataset):
    referred = dataset == DPO
    two = scored(world, models, dataset, 2, referred=referred)
    other = [
        scored(world, models, dataset, 5, referred=referred),
        scored(world, models, dataset, 2, CUT._replace(seq_len=160), referred),
    ]
    with mesh_of(2, 2, 2):
        other.append(scored(world, models, dataset, 4, referred=referred))
    for scores in other:
        for name, ours in scores._asdict().items():
            theirs = getattr(two, name)
            if ours is None:
                assert theirs is None
            else:
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)


def test_numbers_are_those_of_training_with_intervals_around_them(world, models):
    cfg, tok, params = models
    selected = select_records(str(world / "data"), DPO, SPLITS[DPO])
    documents = pack_records(selected, tok, CHAT, CUT)
    pairs = score(documents, [Scorer(cfg, p) for p in params], 5)
    scores = summarize(pairs, documents, 0.3, Resampling(200, 0))
    again = summarize(pairs, documents, 0.3, Resampling(200, 1))
    for name, value in pair_means(answer_table(pairs, 0.3), 0.3).items():
        assert scores.all[name].value == pytest.approx(value, rel=1e-12)
        assert scores.all[name].low <= value <= scores.all[name].high
    assert scores.all["rewards/margins"].low != again.all["rewards/margins"].low
    margins = 0.3 * ((pairs.logps - pairs.ref_logps) @ [0, 1, -1])
    assert scores.all["loss"].value == pytest.approx(np.log1p(np.exp(-margins)).mean())
    total = pairs.logps[:, 1].sum() / pairs.tokens[:, 1].sum()
    assert scores.all["perplexity/chosen"].value == pytest.approx(np.exp(-total))
    assert len(scores.sources) > 1
    assert sum(scores.source_counts.values()) == scores.counts["pairs"] == len(pairs.logps)
    parts = [
        scores.sources[name]["rewards/margins"].value * count
        for name, count in scores.source_counts.items()
    ]
    assert sum(parts) == pytest.approx(margins.sum())


def test_pairs_of_one_prompt_are_drawn_together(world, models, tmp_path):
    cfg, tok, params = models
    questions = [f"what is the {word}?" for word in ("lorn", "sun", "name", "rule", "word")]
    rows = [
        {"prompt": prompt, "chosen": f"it is {n} {i}", "rejected": f"no, {i} or {n}" * (1 + i)}
        for n, prompt in enumerate(questions)
        for i in range(4)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("preferences", path, tmp_path / "data")
    selected = select_records(str(tmp_path / "data"), "preferences/own", "train_prefs")
    documents = pack_records(selected, tok, CHAT, CUT)
    pairs = score(documents, [Scorer(cfg, params[0])], 5)
    scores = summarize(pairs, documents, 0.1, Resampling(200, 0))
    counts = scores.counts
    assert counts["pairs"] > counts["prompts"] == len(np.unique(documents.prompts)) > 1
    assert counts["prompts"] <= len(questions)
    assert not scores.sources
    assert "rewards/margins" not in scores.all
    mean = {"x": mean_of(pairs.logps[:, 1])}
    together = intervals(mean, documents.prompts, samples=200, seed=0)["x"]
    assert scores.all["logps/chosen"] == pytest.approx(together)
    assert scores.all["logps/chosen"] != pytest.approx(intervals(mean, samples=200, seed=0)["x"])
    each = pairs.logps[:, 1:] / pairs.tokens[:, 1:]
    shares = scores.all["logps/accuracies_per_token"], scores.all["logps/accuracies"]
    assert shares[0].value == pytest.approx((each[:, 0] > each[:, 1]).mean())
    assert shares[0].value != shares[1].value


def test_two_models_logits_are_held_for_a_few_rows_at_a_time(world, models, monkeypatch):
    seen, compute = [], scoring._compute

    def spy(branched, scorers, rows):
        seen.append(rows.tokens.shape)
        return compute(branched, scorers, rows)

    monkeypatch.setattr(scoring, "_compute", spy)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 2 * 400 * CUT.seq_len)
    scored(world, models, DPO, 5, referred=True)
    scored(world, models, DPO, 5)
    assert set(seen) == {(2, CUT.seq_len), (5, CUT.seq_len)}


def run(capsys, *words):
    """What the command prints: the table, and the JSON of the last line."""
    main(["evaluate", *map(str, words)])
    *table, last = capsys.readouterr().out.splitlines()
    return "\n".join(table), json.loads(last)


def test_the_command_prints_perplexity(world, models, folders, capsys):
    words = f"--model={folders / 'a'}", f"--data_dir={world / 'data'}", f"--dataset={SFT}"
    table, result = run(capsys, *words, "--seq_len=128")
    documents = dialogues_alone(world, models, 128)
    cfg, _, params = models
    sequences, masks = [x.tokens for x in documents], [x.loss_mask for x in documents]
    _, logps, mask = alone(cfg, params[0], sequences, masks)
    nll = -logps.sum() / mask.sum()
    metrics = result["numbers"]
    assert metrics["nll"]["value"] == pytest.approx(nll, rel=1e-5)
    assert metrics["perplexity"]["value"] == pytest.approx(np.exp(nll), rel=1e-4)
    assert metrics["perplexity"]["low"] < np.exp(nll) < metrics["perplexity"]["high"]
    each = (-logps.sum(axis=1) / mask.sum(axis=1)).mean()
    assert metrics["nll/per_dialogue"]["value"] == pytest.approx(each, rel=1e-5)
    assert result["counts"] == {"dialogues": len(documents), "target_tokens": mask.sum()}
    assert result["kind"] == "dialogues"
    assert (result["max_length"], result["chat_of"]) == (128, "the project's default")
    assert "perplexity " in table
    assert "loss_on assistant" in table


def test_a_model_with_itself_as_reference_is_a_tie(world, folders, capsys, tmp_path):
    output = tmp_path / "result.json"
    words = [f"--model={folders / 'b'}", f"--data_dir={world / 'data'}", f"--dataset={DPO}"]
    words += [
        f"--split={SPLITS[DPO]}",
        f"--reference={folders / 'b'}",
        "--seq_len=192",
        "--fsdp=2",
    ]
    main(["evaluate", *words, "--tensor=2", f"--output={output}", "--beta=0.3"])
    table, result = capsys.readouterr().out, json.loads(output.read_text())
    for name, value in {
        "rewards/accuracies": 0, "rewards/ties": 1, "rewards/margins": 0, "kl": 0,
        "kl_per_token": 0, "drift/chosen": 0, "loss": np.log(2),
    }.items():  # fmt: skip
        interval = result["numbers"][name]
        assert interval["low"] == pytest.approx(interval["high"], abs=1e-12)
        assert interval["value"] == pytest.approx(value, abs=1e-12), name
    assert 0 < result["numbers"]["logps/accuracies"]["value"] < 1
    assert result["beta"] == 0.3
    assert result["chat"]["append_eos"]
    assert result["chat_of"] == "the model's own run"
    assert (result["max_length"], result["max_prompt_length"]) == (96, 48)
    assert "rewards/accuracies by source" in table
    assert [x.name for x in tmp_path.iterdir()] == ["result.json"]


def test_the_first_records_of_several_sets(world, folders, capsys, tmp_path):
    row = {"prompt": "what is it?", "chosen": "it is a word", "rejected": "no"}
    rows = [row | {"prompt": f"what is {i}?"} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    prepare("preferences", tmp_path / "own.jsonl", data, "mine")
    prepare("ultrafeedback", world / "raw" / "ultrafeedback", data, "raw")
    words = [f"--model={folders / 'a'}", f"--data_dir={data}", "--limit=2", "--seq_len=192"]
    words += [f"--dataset={DPO}, preferences/mine", "--split=train_prefs"]
    table, result = run(capsys, *words)
    assert result["counts"]["pairs"] == result["records"]["read"] == 4
    assert result["sources"]["preferences/mine"]["documents"] == 2
    assert "preferences/mine (2)" in table
    assert "beta" not in result
    assert "rewards/accuracies" not in result["numbers"]


def test_a_model_without_finite_scores_is_no_result(world, models):
    cfg, tok, params = models
    lost = jax.tree.map(lambda x: x * np.nan, params[0])
    documents = pack_records(select_records(str(world / "data"), SFT), tok, CHAT, CUT)
    with pytest.raises(FloatingPointError, match="have no finite log-prob"):
        score(documents, [Scorer(cfg, lost)], 5)
