"""The report page: whole and partial folders, escaping, and that nothing outside it is needed."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from zephyr_jax.config.run import load_config
from zephyr_jax.evaluation.pairs import PairTable, save_table
from zephyr_jax.reports.demo import write_report

EVIL = "<script>alert('x')</script> & \x15\nnext"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects the text, tags and attributes; every tag must be closed in its order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair_metrics(step, prefix=""):
    families = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    names = (*families, "logps/chosen", "logps/rejected", "logps/accuracies", "loss")
    values = {prefix + name: 0.01 * step + 0.1 * i for i, name in enumerate(names)}
    return values | {prefix + "rewards/ties": float(step == 0)}


@pytest.fixture
def begun(tmp_path):
    """A demo whose SFT has just begun: nothing prepared is listed, nothing judged."""
    write(tmp_path / "demo.json", {"short": True, "seed": 0})
    write(tmp_path / "timing.json", {"corpus": 1.25, "sft": 64.0})
    rows = [
        {"step": 0, "split": "eval", "eval_loss": 6.6543},
        {"step": 10, "split": "train", "loss": 5.5, "target_tokens_per_s": 321.0},
        {"step": 20, "split": "train", "loss": 4.5, "target_tokens_per_s": 654.0},
        {"step": 20, "split": "eval", "eval_loss": 4.3219},
    ]
    write_rows(tmp_path / "sft" / "metrics.jsonl", rows)
    return tmp_path


@pytest.fixture
def whole(begun):
    """A demo that is through."""
    write(begun / "demo.json", {"short": False, "seed": 0})
    stages = {"corpus": 1.25, "prepare": 30, "sft": 64, "dpo": 20, "export": 2, "judge": 3700}
    write(begun / "timing.json", stages)
    rows = [
        {"step": step, "split": "eval"} | pair_metrics(step, "eval_") for step in (0, 5, 10)
    ] + [
        {"step": step, "split": "train", "target_tokens_per_s": 99.0} | pair_metrics(step)
        for step in (5, 10)
    ]
    write_rows(begun / "dpo" / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))
    recipe = load_config("demo_dpo").to_dict()
    recipe["dpo"]["beta"] = 0.5
    write(begun / "dpo" / "run_config.json", recipe)
    drift = np.array([[2.0, -4.0], [1.0, 0.0], [3.0, -1.0]])  # margins 3, 0.5 and 2
    zeros = np.zeros_like(drift)
    for step, move in ((0, zeros), (10, drift)):
        scored = PairTable(np.arange(1, 4), np.ones(3), move, zeros, zeros + 7)
        save_table(scored, begun / "dpo" / "evaluations" / f"{step:06d}.npz")
    questions = [
        {
            "messages": [{"role": "user", "content": f"Which {kind}?"}],
            "answers": ["Blue.", "It is blue."],
            "kind": kind,
            "base": EVIL,
            "sft": "Blue.",
            "dpo": " It is blue.",
        }
        for kind in ("fact", "<b>odd</b>")
    ]
    rates = {"base": 0.0, "sft": 0.8771, "dpo": 1.0}
    results = {
        "exact": rates,
        "exact_by_kind": {row["kind"]: rates for row in questions},
        "preference_accuracy": {"sft_log_likelihood": 0.5432, "dpo_implicit_reward": 0.9123},
        "questions": questions,
    }
    write(begun / "results.json", results)
    report = {
        "rows": {"read": 4321, "bad": 0, "kept": {"train_sft": 4000, "test_sft": 300}},
        "rules": {"truecase": 17, "refusal": 21, "score_10_to_1": 4},
        "examples": {
            "truecase": [{"where": "a:1", "before": ["it. is & so"], "after": ["It. Is & so"]}],
            "refusal": [{"where": "a:2", "before": [EVIL, " "], "after": None}],
            "score_10_to_1": [
                {"where": "a:3", "before": ["9: x", "10: y", "2: z"], "after": ["9: x", "1: y"]}
            ],
        },
    }
    for name in ("ultrachat", "ultrafeedback"):
        write(begun / "data" / name / "raw" / "1.0.0" / "report.json", report)
    split = {"rows": 12, "documents": 345, "tokens": 2900, "padding_share": 0.0567, "truncated": 3}
    manifest = {"seq_len": 256, "splits": {"train": split, "eval": split}}
    write(begun / "data/packed/sft-1/manifest.json", manifest | {"made_from": {"stage": "sft"}})
    pairs = {"made_from": {"stage": "dpo"}, "rows_per_batch": 7, "batch_size": 32, "epochs": 2}
    write(begun / "data/packed/dpo-1/manifest.json", manifest | pairs)
    write(begun / "data/packed/dpo-2.tmp/manifest.json", {"unfinished": True})
    (begun / "hf").mkdir()
    return begun


def read(root):
    path = write_report(root)
    assert path == root / "report.html"
    assert not (root / "report.html.tmp").exists()
    return path.read_text()


def test_says_the_numbers(whole):
    page = Page(read(whole))
    for said in (
        *("0%", "87.7%", "100%", "54.3%", "91.2%", "345 held-out pairs", "1 min 4 s", "1 h 3 min"),
        *("6.654", "4.322", "20 steps", "4,321", "4,000", "17", "21", "5.7%", "7 rows"),
        *("Implicit rewards, held-out, at the end", "chosen 1, rejected -0.8333", "margin 1.833"),
        *("All of it is synthetic", f"--model={whole}/hf --chat", "configs/zephyr_7b_dpo.py"),
    ):
        assert said in page.text, said
    assert "not run yet" not in page.text
    assert "short run" not in page.text


def test_right_and_wrong_are_words(whole):
    page = Page(read(whole))
    assert page.text.count("✓ right") == 4
    assert page.text.count("✗ wrong") == 2


def test_examples_mark_what_changed(whole):
    source = read(whole)
    assert "<mark>It.</mark> <mark>Is</mark> &amp; so" in source
    assert "rejected 1: y" in Page(source).text.replace("  ", " ")


def test_escapes_data(whole):
    source = read(whole)
    page = Page(source)
    assert "script" not in page.tags
    assert "<b>odd" not in source
    assert r"<script>alert('x')</script> & \x15 next" in page.text


def test_needs_nothing_from_outside(whole):
    source = read(whole)
    page = Page(source)
    assert page.tags.count("svg") == 10
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', source):
        assert target in ids
    assert "#0a0b" not in source  # every color became the page's own


def test_same_run_gives_the_same_page(whole):
    assert read(whole) == read(whole)


def test_partial_folder(begun):
    page = Page(read(begun))
    assert page.text.count("not run yet") >= 8
    assert "short run" in page.text
    assert page.tags.count("svg") == 2
    assert "20 steps" in page.text


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_of_one_line(begun, stage):
    row = {"step": 0, "split": "eval"} | pair_metrics(0, "eval_")
    write_rows(begun / stage / "metrics.jsonl", [row])
    assert "svg" in Page(read(begun)).tags


def test_no_demo(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no demo") as error:
            write_report(folder)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_import_does_not_load_matplotlib():
    code = "import sys, zephyr_jax.reports.demo; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
