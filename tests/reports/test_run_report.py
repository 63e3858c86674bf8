"""The page of a training run: finished, unfinished, stopped and continued, of one step, odd."""

import json
import re

import numpy as np
import pytest
from runs import ONE, config_of, mesh_of
from test_report import EVIL, Page, pair_means, write, write_rows

from zephyr_jax import __main__ as command_line
from zephyr_jax.cli import train
from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation.pairs import PairTable, save_table
from zephyr_jax.reports import plots as report_plots
from zephyr_jax.reports import samples as run_samples
from zephyr_jax.reports.curves import dpo_plots
from zephyr_jax.reports.run import write_run_report
from zephyr_jax.reports.run_folder import read_run


def train_row(step, elapsed, **more):
    speed = {"target_tokens_per_s": 100.0 * step, "tokens_per_s": 150.0 * step}
    row = {"step": step, "split": "train", "loss": 5 / step, "grad_norm": 0.5 * step}
    return row | {"learning_rate": 1e-5 * step, "elapsed_s": elapsed} | speed | more


def saved(root, step, meta):
    folder = root / "checkpoints" / str(step) / "meta"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(meta | {"step": step}))


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of a page's time; without this fixture they are real."""
    monkeypatch.setattr(report_plots, "render", lambda plot: f'<svg aria-label="{plot.name}"/>')


@pytest.fixture
def sft(tmp_path):
    """A finished SFT run that was stopped once; its data are there."""
    root, data = tmp_path / "run", tmp_path / "data"
    config = load_config("demo_sft", ["--config.optim.peak_lr=0.125", "--config.seed=77"]).to_dict()
    config["data"] |= {"data_dir": str(data), "tokenizer": EVIL}
    write(root / "run_config.json", config)
    rows = [
        {"step": 0, "split": "eval", "eval_loss": 6.6543},
        train_row(2, 10.0, goodput=0.5, target_tokens=300),
        train_row(4, 12.0, goodput=0.6, target_tokens=400),
        train_row(6, 5.0, goodput=0.25, target_tokens=500, wall_s=40.0, productive_s=30.0, mfu=0.4),
        {"step": 6, "split": "eval", "eval_loss": 4.3219},
    ]
    write_rows(root / "metrics.jsonl", rows)
    lineage = ["random weights", "SFT by <b>somebody</b>"]
    meta = {"lineage": lineage, "packed": "sft-1", "total_steps": 6, "init_digest": "abc123"}
    saved(root, 6, meta)
    report = {
        "rows": {"read": 200, "bad": 3, "kept": {"train_sft": 150, "test_sft": 20}},
        "rules": {"truecase": 17},
        "examples": {"truecase": [{"where": "a:1", "before": ["it."], "after": ["It."]}]},
    }
    folder = data / "ultrachat" / "raw" / "1.0.0"
    write(folder / "report.json", report)
    write(folder / "dataset_info.json", {})
    split = {"rows": 12, "documents": 345, "tokens": 2900, "target_tokens": 1234}
    split |= {"padding_share": 0.0567, "truncated": 3}
    manifest = {"seq_len": 256, "splits": {"train": split, "eval": split}}
    write(data / "packed/sft-1/manifest.json", manifest | {"made_from": {"stage": "sft"}})
    return root


@pytest.fixture
def pairs(tmp_path):
    """A preference run under way: no checkpoint, its data elsewhere."""
    root = tmp_path / "run"
    config = load_config("demo_dpo").to_dict() | {"name": "my_own"}
    config["dpo"]["beta"] = 0.5
    write(root / "run_config.json", config)
    rows = [{"step": step, "split": "eval"} | pair_means(step, "eval_") for step in (0, 5, 10)]
    for row in rows:
        row |= {"eval_source/flan/x/pairs": 48.0, "eval_source/flan/x/loss": 0.6123}
    rows += [train_row(s, s, pairs_per_s=7.25) | pair_means(s) for s in (5, 10)]
    write_rows(root / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))
    drift = np.array([[2.0, -4.0], [1.0, 0.0], [3.0, -1.0]])  # margins 3, 0.5 and 2
    zeros = np.zeros_like(drift)
    for step, move in ((0, zeros), (10, drift)):
        scored = PairTable(np.arange(1, 4), np.ones(3), move, zeros, zeros + 7)
        save_table(scored, root / "evaluations" / f"{step:06d}.npz")
    write(root / "heartbeat.json", {"step": 10, "total_steps": 50})
    return root


def read(root):
    path = write_run_report(root)
    assert str(path) == str(root / "report.html")
    source = path.read_text()
    page = Page(source)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    return page


def test_says_what_was_learned_from_what(sft):
    page = read(sft)
    for said in (
        *("6 of 6 steps done", "continued after step 4", "6.6543", "4.3219"),
        *("wall 40 s", "goodput 75%", "MFU 40%", "target tokens/s 500", "1,200"),
        *("0.125", "seed 0 77", "random weights", "abc123"),
        *("kept for train_sft 150 75%", "left out 30 15%", "345", "1,234", "5.7%"),
    ):
        assert said in page.text, said
    assert "SFT by <b>somebody</b>" in page.text
    assert r"<script>alert('x')</script> & \x15 next" in page.text
    assert page.tags.count("svg") == 6  # loss, rate, norm, speed, MFU, goodput


def test_only_fields_that_differ_are_in_the_table(sft, undrawn):
    page = read(sft)
    assert re.search(r"4 of \d+ fields differ from the recipe demo_sft", page.text)
    differing = page.text.split("fields differ from the recipe")[1].split("All ")[0]
    assert "optim.schedule" not in differing


def test_a_preference_run_under_way(pairs):
    page = read(pairs)
    for said in (
        *("10 of 50 steps so far", "my_own", "No recipe named my_own ships", "no checkpoint"),
        *("pairs/s 7.25", "flan/x 48 0.6123", "margin 1.833", "3 held-out pairs"),
        *("the prepared set is not in", "--samples=3"),
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 11


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "split": "eval"} | pair_means(0, "eval_")],
        [train_row(1, 1.0) | pair_means(1)],
        [{"step": step, "split": "eval"} | pair_means(step, "eval_") for step in range(40)],
    ],
    ids=["nothing", "an evaluation", "a step", "forty evaluations"],
)
def test_whatever_little_is_there(pairs, undrawn, rows):
    for path in (pairs / "evaluations").glob("*"):
        path.unlink()
    write_rows(pairs / "metrics.jsonl", rows)
    page = read(pairs)
    assert "my_own" in page.text
    assert ("not evaluated yet" in page.text) == (not any("eval_loss" in row for row in rows))
    if len(rows) == 40:
        assert "6 of 40 evaluations" in page.text


def test_a_loss_that_is_not_dpos(pairs, undrawn):
    assert "Direct preference" in read(pairs).text
    config = json.loads((pairs / "run_config.json").read_text())
    config["dpo"]["loss"] = "ipo"
    write(pairs / "run_config.json", config)
    assert "Direct" not in read(pairs).text
    plots = dpo_plots(read_run(pairs).rows, sigmoid=False)
    assert all(plot.level is None for plot in plots if plot.name == "dpo-loss")


def test_samples_stand_beside_each_other(sft, undrawn):
    prompt = {"place": "set, record 0", "messages": [{"role": "user", "content": EVIL}]}
    made = {"tokens": 64, "prompts": [prompt | {"answer": "Own."}]}
    write(sft / "samples.json", made | {"replies": {"3": ["Three."], "6": [""]}})
    text = read(sft).text
    assert "step 3 Three. step 6 (nothing) the record's own answer Own." in text
    write(sft / "samples.json", {"reason": "Too <large>."})
    assert "Too <large>." in read(sft).text


def test_wall_time_of_older_runs_adds_their_starts(sft):
    rows = [train_row(2, 10.0), train_row(4, 12.0), train_row(6, 5.0)]
    write_rows(sft / "metrics.jsonl", rows)
    run = read_run(sft)
    assert run.seconds() == (17.0, None)
    assert run.starts == [4]


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run") as error:
        write_run_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_one_training_run_ends_with_its_page(world, tmp_path, undrawn, monkeypatch):
    """The command, one step, and a report again with no samples."""
    config = config_of(world, "sft", max_steps=1, log_every=1, micro_batches=1)
    monkeypatch.setattr(train, "load_config", lambda *_: config)
    monkeypatch.setattr(run_samples, "TOKENS", 8)
    with mesh_of(ONE):
        words = ["train", "--config=demo_sft", f"--workdir={tmp_path / 'run'}", "--samples=2"]
        command_line.main(words)
    made = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert list(made["replies"]) == ["1"]
    assert len(made["replies"]["1"]) == len(made["prompts"]) == 2
    first, second = (prompt["messages"] for prompt in made["prompts"])
    assert first != second
    assert all(messages[-1]["role"] == "user" for messages in (first, second))
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "1 of 1 steps done" in page.text
    assert "the record's own answer" in page.text
    command_line.main(["report", str(tmp_path / "run"), "--samples=0"])
    assert "None were asked for" in (tmp_path / "run" / "report.html").read_text()


def test_large_models_get_a_reason_and_no_replies(world, tmp_path, monkeypatch):
    config = config_of(world, "sft")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    monkeypatch.setattr(run_samples, "LARGEST", 1000)
    run_samples.write_samples(config, tmp_path, 3)
    said = json.loads((tmp_path / "samples.json").read_text())["reason"]
    assert "more than 1,000" in said
    monkeypatch.setattr(run_samples.jax, "process_count", lambda: 4)
    run_samples.write_samples(config, tmp_path, 3)
    assert "4 processes" in json.loads((tmp_path / "samples.json").read_text())["reason"]


def test_a_report_that_fails_is_said_and_fails(tmp_path, monkeypatch, capsys):
    config = load_config("demo_sft")
    monkeypatch.setattr(train, "load_config", lambda *_: config)
    monkeypatch.setattr("zephyr_jax.training.loop.fit", lambda *_: None)
    with pytest.raises(SystemExit) as ended:  # there is no run in this folder
        command_line.main(["train", "--config=demo_sft", f"--workdir={tmp_path}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "only its report failed" in said
    assert "holds no run" in said


@pytest.mark.parametrize("command", ["train --config=demo_sft", "report nowhere"])
def test_a_negative_number_of_samples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([*command.split(), "--samples=-1"])
    assert ended.value.code == 2
    assert "--samples=-1 must be 0 or more" in capsys.readouterr().err
