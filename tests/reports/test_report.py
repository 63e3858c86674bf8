"""Reports of runs and of the demo: their numbers, escaping, and that nothing outside is needed."""

import base64
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import markdown_it
import numpy as np
import pytest
from absl import logging
from raw_rows import write as write_rows
from runs import config_of

import zephyr_jax as zj
from zephyr_jax import __main__ as command_line
from zephyr_jax.chips import commit
from zephyr_jax.cli import train
from zephyr_jax.config.run import load_config
from zephyr_jax.demo.run import write_demo_report
from zephyr_jax.evaluation.pairs import PairTable, save_table
from zephyr_jax.reports import plots, samples
from zephyr_jax.reports.plots import Histogram, Plot, Series, learning_plots
from zephyr_jax.reports.run import Run, write_run_report
from zephyr_jax.weights.exports import plain

EVIL = "<script>alert('x')</script> & \x15\nnext"
EVIL_ESCAPED = r"<script>alert('x')</script> & \x15 next"


class Parsed(html.parser.HTMLParser):
    """A page's text, tags and attributes; every tag must be closed in its order."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open += [tag] if tag != "meta" else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [data] if self.open[-1:] not in (["style"], ["script"]) else []


def read(path):
    """The page at a path, which must be self-contained and have no script but its own."""
    page = Parsed(path.read_text())
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert page.tags.count("script") == ("svg" in page.tags)
    for script in re.findall("<script>(.*?)</script>", page.source, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'\"" in page.source  # and a browser runs no other
    assert not re.search(r"https?:|url\((?!#)|@import", page.source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', page.source):
        assert target in ids
    assert "#0a0b" not in page.source  # every color became the page's own
    return page


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pair_means(step, prefix=""):
    families = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    names = (*families, "logps/chosen", "logps/rejected", "logps/accuracies", "loss")
    values = {prefix + name: 0.01 * step + 0.1 * i for i, name in enumerate(names)}
    return values | {prefix + "rewards/ties": float(step == 0)}


def train_row(step, elapsed, **more):
    speed = {"target_tokens_per_s": 100.0 * step, "tokens_per_s": 150.0 * step}
    row = {"step": step, "split": "train", "loss": 5 / step, "grad_norm": 0.5 * step}
    return row | {"learning_rate": 1e-5 * step, "elapsed_s": elapsed} | speed | more


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of a page's time; without this fixture they are real."""
    monkeypatch.setattr(plots, "render", lambda plot: f'<svg aria-label="{plot.title}"/>')


@pytest.fixture
def sft(tmp_path):
    """A finished SFT run that was stopped once; its data are there."""
    root, data = tmp_path / "sft", tmp_path / "data"
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
    start = {"date": "2026-01-02 03:04 +0000", "host": "pod-a", "processes": 4, "backend": "tpu"}
    start |= {"devices": "16 x TPU v4", "versions": {"jax": "0.1.2"}, "commit": "abc-dirty"}
    write(root / "run_info.json", {"starts": [start, start | {"host": "pod-b"}]})
    meta = {"lineage": ["random weights", "SFT by <b>somebody</b>"], "init_digest": "abc123"}
    meta |= {"packed": "sft-1", "total_steps": 6, "step": 6}
    write(root / "checkpoints" / "6" / "meta" / "metadata", meta)
    fixed = {"where": "a:1", "before": ["it. is & so"], "after": ["It. Is & so"]}
    pair = {"where": "a:3", "before": ["9: x", "10: y", "2: z"], "after": ["9: x", "1: y"]}
    refused = {"where": "a:2", "before": [EVIL, " "], "after": None}
    report = {"made_from": {}, "records_sha256": {}}
    report |= {"rows": {"read": 200, "bad": 3, "kept": {"train_sft": 150, "test_sft": 20}}}
    report |= {"rules": {"truecase": 17, "refusal": 21, "score_10_to_1": 4}}
    report |= {"examples": {"truecase": [fixed], "refusal": [refused], "score_10_to_1": [pair]}}
    folder = data / "ultrachat" / "raw" / "1.1.0"
    write(folder / "report.json", report)
    write(folder / "dataset_info.json", {})
    split = {"rows": 12, "documents": 345, "tokens": 2900, "target_tokens": 1234}
    split |= {"padding_share": 0.0567, "truncated": 3}
    manifest = {"seq_len": 256, "made_from": {"stage": "sft"}, "pairs_per_row": 0}
    manifest |= {"splits": {"train": split, "eval": split}}
    write(data / "packed/sft-1/manifest.json", manifest)
    return root


@pytest.fixture
def dpo(tmp_path):
    """A preference run under way: no checkpoint, its data elsewhere."""
    root = tmp_path / "dpo"
    config = load_config("demo_dpo", ["--config.name=my_own"]).to_dict()
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


@pytest.fixture
def demo(tmp_path, sft, dpo):
    """The folder of a demo with these two runs."""
    write(tmp_path / "demo.json", {"short": False, "seed": 0})
    stages = {"corpus": 1.25, "prepare": 30, "sft": 64, "dpo": 20, "export": 2, "judge": 3700}
    write(tmp_path / "timing.json", stages)
    question = {"messages": [{"role": "user", "content": "Which?"}]}
    question |= {"answers": ["Yes. Blue.", "Blue. Yes."], "blurting": ["Blue. Yes."]}
    question |= {"base": EVIL, "sft": "Blue. Yes.", "dpo": " Yes. Blue."}
    good = {"model": "s", "overall_score": 9.5, "critique": "Good.", "response": "Yes. Blue."}
    fair = {"model": "s", "overall_score": 7.5, "critique": "Hm.", "response": EVIL}
    rows = [{"instruction": "Again?", "completions": [good, fair]}]
    rows.append({"instruction": "Same?", "completions": [good, good]})
    write_rows(tmp_path / "feedback" / "ultrafeedback.jsonl", rows)
    rates = {"base": 0.0, "sft": 0.8771, "dpo": 1.0}
    results = {
        "exact": rates,
        "forms": {"rejected": {"base": 0.0, "sft": 0.8642, "dpo": 0.0135}},
        "preference_accuracy": {"sft_log_likelihood": 0.5432, "dpo_implicit_reward": 0.9123},
        "questions": [question | {"kind": kind} for kind in ("fact", "sum")],
    }
    write(tmp_path / "results.json", results)
    return tmp_path


def test_a_run_report_shows_what_was_learned_from_what(sft):
    page = read(write_run_report(sft))
    for words in itertools.chain(
        ["6 of 6 steps done", "resumed after step 4", "6.6543", "best, step 6 4.3219"],
        ["all starts 40 s", "goodput 75%", "MFU 40%", "target tokens/s 500"],
        ["Started 2026-01-02 03:04 +0000, 2026-01-02 03:04 +0000", "Host pod-b and 3 more"],
        ["16 x TPU v4 (tpu)", "Commit abc-dirty", f"Run folder {sft}", "jax 0.1.2"],
        ["0.125", "seed 0 77", "random weights", "abc123", "SFT by <b>somebody</b>"],
        ["kept for train_sft 150 75%", "dropped 30 15%", "345", "1,234", "5.7%", "17", "21"],
        [EVIL_ESCAPED, "chosen 9: x rejected 1: y", "(dropped)", "Is & so"],
    ):
        assert words in page.text, words
    assert '<span class="added">It. Is </span>' in page.source
    assert page.tags.count("svg") == 6  # loss, rate, norm, speed, MFU, goodput
    assert re.search(r"4 of \d+ fields differ from the recipe demo_sft", page.text)
    differing = page.text.split("fields differ from the recipe")[1].split("All ")[0]
    assert "optim.schedule" not in differing
    assert write_run_report(sft).read_text() == page.source
    hover = [json.loads(value) for name, value in page.attributes if name == "data-hover"]
    places, texts = zip(*hover[0], strict=True)  # of the loss, under a pointer
    assert texts[0] == "step 0\nheld-out 6.654"
    assert texts[-1] == "step 6\ntrain 0.8333\nheld-out 4.322"
    assert list(places) == sorted(places)
    assert all(0 < place < 4.2 * 72 for place in places)


def test_a_preference_run_under_way(dpo):
    page = read(write_run_report(dpo))
    for words in itertools.chain(
        ["10 of 50 steps so far", "my_own", "No recipe named my_own ships", "No checkpoint"],
        ["pairs/s 7.25", "flan/x 48 0.6123", "Mean 1.833; min 0.5, max 3.", "3 held-out pairs"],
        ["The prepared set is not in", "--samples=3"],
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 11
    assert learning_plots(Run(dpo))[0].level == (np.log(2), "ln 2: no preference")
    config = json.loads((dpo / "run_config.json").read_text())
    config["dpo"]["loss"] = "ipo"
    write(dpo / "run_config.json", config)
    assert "Direct" not in Run(dpo).kind
    assert learning_plots(Run(dpo))[0].level is None


def test_a_run_that_has_hardly_begun_has_a_report(dpo, undrawn):
    shutil.rmtree(dpo / "evaluations")
    undefined = [{"step": 5, "split": "eval", "eval_loss": None}]
    evals = [{"step": step, "split": "eval"} | pair_means(step, "eval_") for step in range(40)]
    for rows, words in (
        ([], "Not evaluated yet"),
        ([train_row(1, 1.0) | pair_means(1)], "Not evaluated yet"),
        (evals[:1], "1 of 1 evaluations"),
        (undefined, "step 5 loss nan"),
        (evals, "6 of 40 evaluations"),
    ):
        write_rows(dpo / "metrics.jsonl", rows)
        assert words in read(write_run_report(dpo)).text


def test_a_report_over_metrics_with_gaps_says_so(sft, undrawn):
    assert "metrics.jsonl" not in read(write_run_report(sft)).text
    rows = [{"step": 0, "split": "eval", "eval_loss": 3.0}]
    rows += [train_row(n, n) for n in (10, 20, 40)]
    path = write_rows(sft / "metrics.jsonl", rows)
    (sft / "metrics.damaged-1.jsonl").touch()
    path.write_bytes(path.read_bytes().replace(b'"eval"', b'"eval'))
    text = read(write_run_report(sft)).text
    assert "metrics.jsonl: line 1 damaged, left out." in text
    assert "before; as it was then: metrics.damaged-1.jsonl." in text
    assert "No line of training from step 20 to 40." in text


def test_rounds_are_shown_side_by_side_and_results_of_benchmarks(dpo, tmp_path, undrawn):
    text = read(write_run_report(dpo)).text
    assert "comes from collect_feedback.py" in text
    assert "evaluate.py --output=WORKDIR/evaluations/NAME.json" in text
    share = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 8}
    for n, init, held_to in ((1, f"{tmp_path}/sft", ""), (2, f"{tmp_path}/round_1", "first")):
        root = shutil.copytree(dpo, tmp_path / f"round_{n}")
        fields = {"init": init, "data.data_dir": f"{root}/data", "dpo.reference_model": held_to}
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        write(root / "run_config.json", load_config("demo_dpo", words).to_dict())
        account = {"prompts": {"read": 9, "prompts": 8}, "judgements": {"rated": 1000 * n}}
        account |= {"answers": {"a": {"answered": 7}, "b": {"answered": n}}}
        account |= {"agreement": {"overall": {"self_agreement": share}}}
        folder = root / "data" / "ultrafeedback" / "raw" / "1.1.0"
        report = {"rows": {"read": 8, "bad": 0, "kept": {"train_prefs": 5}}, "rules": {}}
        report |= {"made_from": {}, "records_sha256": {}}
        write(folder / "report.json", report | {"examples": {}, "feedback": account})
        write(folder / "dataset_info.json", {})
        score = {"value": 5.0 + n, "low": 5.0, "high": 8.0}
        model = {"model": f"m{n}", "numbers": {"score": score}, "digest": "f" * 64}
        result = {"kind": "mt-bench", "judge": "gpt-4", "models": [model]}
        write(root / "evaluations" / "mt.json", result)
    text = read(write_run_report(tmp_path / "round_2")).text
    for words in (
        f"round_1 round_2 began with {tmp_path / 'sft'} {tmp_path / 'round_1'}",
        f"held to {tmp_path / 'sft'} first",
        "prompts 8 8 answers 8 9 judge, rated 1,000 2,000 pairs to train on 5 5",
        "overall, self agreement 75% (50% to 100%) 75% (50% to 100%)",
        "held-out reward accuracy 40% 40% MT-Bench (gpt-4) 6.00 (5.00 to 8.00) 7.00 (5.00 to 8.00)",
        "m2 7.00 (5.00 to 8.00)",
        "Llama-2-70B-chat (published) 6.86",
        "m2: MT-Bench (gpt-4): model ffffffffffff",
    ):
        assert words in text, words


def test_samples_are_shown_side_by_side_or_the_reason(sft, undrawn):
    prompt = {"place": "set, record 0", "messages": [{"role": "user", "content": EVIL}]}
    content = {"prompts": [prompt | {"answer": "Own."}]}
    write(sft / "samples.json", content | {"replies": {"3": ["Three."], "6": [""]}})
    text = read(write_run_report(sft)).text
    assert "step 3 Three. step 6 (nothing) the record's own answer Own." in text
    write(sft / "samples.json", {"reason": "Too <large>."})
    assert "Too <large>." in read(write_run_report(sft)).text


def test_the_demos_report_shows_both_runs_and_the_answers(demo, undrawn):
    page = read(write_demo_report(demo))
    for words in itertools.chain(
        ["87.7%", "54.3%", "91.2%", "3 held-out pairs", "1 min 4 s", "1 h 3 min"],
        ["4.3219", "6 of 6 steps done", "10 of 50 steps so far", "Mean 1.833"],
        ["(rejected form) 0% 86.4% 1.4%"],
        ["All of it is synthetic", f"--model={demo}/hf --chat", "fact 1 0% 100% 100%"],
        [EVIL_ESCAPED],
    ):
        assert words in page.text, words
    assert "short run" not in page.text
    for words in ("base: wrong", "SFT: right, blurts it out", "DPO: right, ends with the answer"):
        assert page.text.count(words) == 2
    targets = [value for name, value in page.attributes if name == "href" and value[0] != "#"]
    assert targets == ["sft/report.html", "dpo/report.html"]
    assert page.tags.count("svg") == 12
    write(demo / "demo.json", {"short": True})
    assert "short run" in read(write_demo_report(demo)).text


@pytest.mark.parametrize("write_report", [write_run_report, write_demo_report])
def test_a_folder_without_a_run_is_refused(tmp_path, write_report):
    with pytest.raises(FileNotFoundError, match="holds no run") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_histogram_shows_its_counts_under_a_pointer():
    values = {"a": np.array([1, 1, 1, 2]), "b": np.array([4])}
    hover = re.findall('data-hover="(.*?)"', plots.render(Histogram("t", "x", "y", values)))[0]
    texts = [text for _, text in json.loads(html.unescape(hover))]
    assert texts == [
        f"{n - 0.5} to {n + 0.5}\na {a}\nb {b}"
        for n, a, b in zip([1, 2, 3, 4], [3, 1, 0, 0], [0, 0, 0, 1], strict=True)
    ]
    for odd in ([3.0], [2.0, 2.0], [0.0] * 500 + [1e9], np.arange(-5, 5)):
        assert plots.render(Histogram("t", "x", "y", {"x": np.asarray(odd)})).endswith("</svg>\n")


@pytest.mark.parametrize("n", [23, 24, 1001])
def test_long_curves_are_smoothed_over_their_values(n):
    values = np.random.default_rng(0).normal(size=n)
    plot = Plot("t", "y", [Series("", list(enumerate(values)), "train")])
    assert plot.window % 2 == 1
    smooth = ("mean of" in plot.caption, "opacity: 0.3" in plots.render(plot), plot.window > 1)
    assert smooth == (n >= 24,) * 3
    mean, half = plots.running_mean(values, plot.window), plot.window // 2
    for at in (0, n // 2, n - 1):
        assert mean[at] == pytest.approx(np.mean(values[max(0, at - half) : at + half + 1]))


def test_the_best_step_is_the_one_of_the_lowest_held_out_loss_or_of_keep_best(dpo, undrawn):
    losses, name = {0: 3.0, 5: 1.0, 9: 2.0}, "eval_rewards/accuracies"
    rows = [{"step": s, "split": "eval", "eval_loss": x, name: 0.35} for s, x in losses.items()]
    write_rows(dpo / "metrics.jsonl", rows[:1])
    assert Run(dpo).best_step("loss") is None
    write_rows(dpo / "metrics.jsonl", rows)
    assert learning_plots(Run(dpo))[0].best == 5
    assert "best, step 5 1.0000" in read(write_run_report(dpo)).text
    write(dpo / "best.json", {"step": 5, "metric": name, "value": 0.35})
    write(dpo / "heartbeat.json", {"step": 10, "total_steps": 50, "doing": "done"})
    marked = {plot.title: plot.best for plot in learning_plots(Run(dpo)) if plot.best is not None}
    assert marked == {"Reward accuracy": 5}
    text = read(write_run_report(dpo)).text
    assert "best by rewards/accuracies, step 5 0.3500" in text
    assert "9 of 50 steps done; stopped early" in text


def test_the_commit_is_that_of_a_checkout_of_ours_alone(tmp_path):
    def git(*words):
        own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path]
        subprocess.run([*own, *words], check=True, capture_output=True)

    (tmp_path / "a.py").write_text("")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    assert commit(tmp_path) == ""  # installed below somebody's checkout
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert re.fullmatch("[0-9a-f]{12}", commit(tmp_path))
    (tmp_path / "a.py").write_text("1")
    assert commit(tmp_path).endswith("-dirty")


HOSTILE = """# x|- x|1. x|---|===|> x|*x*|_x_|__x__|a_b|`x`|<b>x</b>|[x](y)|![x](y)|<http://x.y>
~~x~~|&lt;|\\*x|[x]: y|eval_loss -1.5|+ x|a**b**c|2) x|$x$|a__b__c"""


@pytest.mark.parametrize("name", [*re.split(r"[|\n]", HOSTILE), "a|b", "x\n# y"])
def test_names_in_markdown_show_as_they_are(name):
    parser = markdown_it.MarkdownIt().enable(["table", "strikethrough"])
    shown, wanted = plain(name), " ".join(name.split())
    page = parser.render(f"{shown}\n\n* {shown}\n\n# {shown}\n\n| a |\n|---|\n| {shown} |\n")
    tags = re.findall("<([a-z0-9]+)", page)
    assert tags == ["p", "ul", "li", "h1", "table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert html.unescape(re.sub("<[^>]*>", "", page)).count(wanted) == 4


def test_a_training_run_ends_with_its_report(sft_run, tmp_path, undrawn, monkeypatch, capfd):
    monkeypatch.setattr(train, "load_config", lambda *_: sft_run.config)
    monkeypatch.setattr("zephyr_jax.training.loop.fit", lambda _, root, began: sft_run.copied(root))
    monkeypatch.setattr(samples, "TOKENS", 8)
    root = tmp_path / "run"
    command_line.main(["train", "--config=demo_sft", f"--workdir={root}", "--samples=2"])
    stored = json.loads((root / "samples.json").read_text())
    assert list(stored["replies"]) == ["5", "10"]
    assert len(stored["replies"]["5"]) == len(stored["prompts"]) == 2
    first, second = (prompt["messages"] for prompt in stored["prompts"])
    assert first != second
    assert all(messages[-1]["role"] == "user" for messages in (first, second))
    text = read(root / "report.html").text
    assert "10 of 10 steps done" in text
    assert "the record's own answer" in text
    capfd.readouterr()
    before = logging.get_verbosity(), logging.get_absl_logger().handlers[:]
    shutil.rmtree(root)
    zj.fit(sft_run.config, root, samples=0)  # as in a notebook
    assert capfd.readouterr().err.splitlines()[-1].endswith(f" report: {root / 'report.html'}")
    assert "None were requested" in (root / "report.html").read_text()
    assert before == (logging.get_verbosity(), logging.get_absl_logger().handlers[:])


def test_large_models_get_a_reason_and_no_replies(world, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    monkeypatch.setattr(samples, "LARGEST", 1000)
    samples.write_samples(config_of(world, "sft"), tmp_path, 3)
    assert "more than 1,000" in json.loads((tmp_path / "samples.json").read_text())["reason"]


def test_a_report_that_fails_makes_the_command_fail(tmp_path, monkeypatch, capsys):
    config = load_config("demo_sft")
    monkeypatch.setattr(train, "load_config", lambda *_: config)
    monkeypatch.setattr("zephyr_jax.training.loop.fit", lambda *_: None)
    with pytest.raises(SystemExit, match="^2$"):  # there is no run in this folder
        command_line.main(["train", "--config=demo_sft", f"--workdir={tmp_path}"])
    message = capsys.readouterr().err
    assert "only its report failed" in message
    assert "holds no run" in message
