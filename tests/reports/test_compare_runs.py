"""Several runs in one page: what differs, whose curves are shared, intervals, bad input."""

import copy

import numpy as np
import pytest
from test_report import EVIL, Page, pair_metrics, write, write_rows

from zephyr_jax import __main__ as command_line
from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation.pairs import PairTable, save_table
from zephyr_jax.reports import plots as report_plots
from zephyr_jax.reports.comparison import compare_runs

SFT, DPO = (load_config(f"demo_{stage}").to_dict() for stage in ("sft", "dpo"))


def make(root, config, counted=True, **fields):
    """A run of 20 steps with two evaluations."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    write(root / "run_config.json", config)
    rows = []
    for step in (0, 10, 20):
        own = {"step": step, "split": "train", "learning_rate": 1e-5, "grad_norm": 1.0 + step}
        own |= {"target_tokens_per_s": 10.0 * step, "elapsed_s": step} | pair_metrics(step)
        own |= {"target_tokens": 1e6} if counted else {}
        rows += [own] * (step > 0)
        rows.append({"step": step, "split": "eval"} | pair_metrics(step, "eval_"))
    write_rows(root / "metrics.jsonl", rows)
    return root


def pairs(root, move):
    drift = np.stack([np.linspace(0, move, 50), np.zeros(50)], axis=1)
    zeros = np.zeros_like(drift)
    table = PairTable(np.arange(1, 51), np.ones(50), drift, zeros, zeros + 7)
    save_table(table, root / "evaluations" / "000020.npz")


@pytest.fixture
def drawn(monkeypatch):
    """The plots of the page, which are not rendered."""
    plots = []

    def render(plot):
        plots.append(plot)
        return f'<svg aria-label="{plot.name}"/>'

    monkeypatch.setattr(report_plots, "render", render)
    return plots


def read(tmp_path, *roots):
    page = compare_runs(roots, str(tmp_path / "page.html"))
    return Page(page.read_text())


def test_fields_that_differ_and_no_others(tmp_path, drawn):
    one = make(tmp_path / "x" / "run", SFT)
    two = make(tmp_path / "y" / "run", SFT, optim__peak_lr=0.25, data__tokenizer=EVIL)
    page = read(tmp_path, one, two)
    assert "x/run" in page.text
    assert "y/run" in page.text
    fields = page.text.split("Fields that differ")[1].split("Curves")[0]
    assert "optim.peak_lr 0.002 0.25" in fields
    assert "optim.schedule" not in fields
    assert r"<script>alert('x')</script> & \x15 next" in fields
    same = read(tmp_path, one, make(tmp_path / "z", SFT))
    assert "configurations are the same" in same.text


def test_curves_lie_over_each_other_by_step_and_by_tokens(tmp_path, drawn):
    roots = [make(tmp_path / name, SFT, counted=name != "old") for name in ("one", "two", "old")]
    page = read(tmp_path, *roots)
    plots = {plot.name: plot for plot in drawn}
    by_step = plots["loss--nats-per-token-step"]
    assert [series.label for series in by_step.series] == ["one", "", "two", "", "old", ""]
    assert [series.heldout for series in by_step.series] == [False, True] * 3
    assert len({series.color for series in by_step.series}) == 3
    by_tokens = plots["loss--nats-per-token-tokens"]
    assert by_tokens.series[0].points[-1][0] == 2e6
    assert by_tokens.series[1].points[0][0] == 0
    assert {series.label for series in by_tokens.series} == {"one", "two", ""}
    assert "Without old" in by_tokens.caption
    assert "learn from pairs" not in page.text


def test_dialogues_beside_pairs(tmp_path, drawn):
    page = read(tmp_path, make(tmp_path / "sft", SFT), make(tmp_path / "dpo", DPO))
    assert "Learning rate and gradient norm are drawn over each other" in page.text
    fields = page.text.split("Fields that differ")[1].split("Curves")[0]
    assert "dpo none given" in fields  # one line for the section, none for what is in it
    assert "dpo.beta" not in fields
    plots = {plot.name: plot for plot in drawn}
    assert len(plots["gradient-norm-step"].series) == 2
    for name in ("loss--nats-per-token-step", "preference-loss-step"):
        assert {series.label for series in plots[name].series} < {"sft", "dpo", ""}


def test_other_losses_are_named(tmp_path, drawn):
    one, two = make(tmp_path / "a", DPO), make(tmp_path / "b", DPO, dpo__loss="ipo")
    read(tmp_path, one, two)
    (loss,) = (plot for plot in drawn if plot.name == "preference-loss-step")
    assert loss.caption == "The losses differ: ipo, sigmoid."


def test_figures_have_intervals_where_pairs_are_stored(tmp_path, drawn):
    one, two = make(tmp_path / "a", DPO), make(tmp_path / "b", DPO)
    assert "[" not in read(tmp_path, one, two).text.split("at the end")[1]
    pairs(one, 1.0)
    pairs(two, 3.0)
    text = read(tmp_path, one, two).text.split("at the end")[1]
    assert "rewards/margins 0.0500 [0.0" in text  # beta 0.1, mean drift 0.5
    assert "Less a, pair by pair" in text
    assert "b 0.0000 [0.0000, 0.0000] 0.1000 [0.0" in text


def test_a_real_page_is_whole(tmp_path):
    one, two = make(tmp_path / ("a" * 40), SFT), make(tmp_path / "b", SFT)
    page = read(tmp_path, one, two)
    assert page.tags.count("svg") == 6
    assert "…" in page.text
    for name, value in page.attributes:
        assert name not in ("src", "href") or value.startswith("#")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("one", "1 runs are named; name 2 to 8"),
        ("one one", "named twice"),
        ("one nowhere", "holds no run"),
        ("one empty", "no line in metrics.jsonl yet"),
        ("one two --output=no/page.html", "there is no folder"),
        ("one two --output=one", "is a folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "one", SFT)
    make(tmp_path / "two", SFT)
    write(tmp_path / "empty" / "run_config.json", SFT)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["compare_runs", "--output=page.html", *words.split()])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "page.html").exists()
