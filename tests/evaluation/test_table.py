"""Results of evaluate in one table with published numbers."""

import json

import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.evaluation.table import read_results

ALPACA = {
    "kind": "alpaca-eval", "model": "us", "baseline": "text_davinci_003",
    "annotator": "alpaca_eval_gpt4", "digest": "abcdef0123456789",
    "numbers": {"win_rate": {"value": 50.25, "low": 40.0, "high": 60.0}},
    "settings": {"temperature": 0.7, "system": ""},
}  # fmt: skip
MT = {
    "kind": "mt-bench", "judge": "gpt-4",
    "models": [{"model": x, "numbers": {"score": {"value": v, "low": v - 1, "high": v + 1}}}
               for x, v in (("us", 6.5), ("them", 3.0))],
}  # fmt: skip
HARNESS = {
    "results": {
        "arc_challenge": {"acc,none": 0.4, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.01},
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": "N/A"},
        "mmlu_anatomy": {"acc,none": 0.3},
        "own": {"f1,none": 0.125},
    },
    "group_subtasks": {"mmlu": ["mmlu_anatomy"], "own": []},
    "n-shot": {"arc_challenge": 25, "mmlu": 5, "mmlu_anatomy": 5, "own": 0},
    "config": {"model": "us", "model_digest": "abc", "model_dtype": "float32", "limit": None},
}
PAIRS = {
    "kind": "pairs", "model": "us", "sets": [{"name": "a/b"}], "dtype": "float32",
    "numbers": {"rewards/accuracies": {"value": 0.75, "low": 0.7, "high": 0.8}},
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    for name, result in (("a", ALPACA), ("m", MT), ("h", HARNESS), ("p", PAIRS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_a_models_results_share_a_row_above_the_published_ones(files, capsys):
    paths = [f"{files}/{name}.json" for name in "amhp"]
    main(["evaluate", "table", *paths, f"--output={files}/t.md"])
    text = (files / "t.md").read_text()
    assert capsys.readouterr().out == text
    head, _, us, them, *rest = text.splitlines()
    names = "model | MT-Bench (gpt-4) | AlpacaEval (alpaca_eval_gpt4) | ARC | MMLU"
    assert head == f"| {names} | own f1 none (0) | rewards/accuracies on a/b |"
    numbers = "6.50 (5.50 to 7.50) | 50.25 (40.00 to 60.00) | 50.00 (48.04 to 51.96)"
    assert us == f"| us | {numbers} | 25.00 | 0.125 | 0.75 (0.70 to 0.80) |"
    assert them.startswith("| them | 3.00")
    assert "\n| Zephyr-7B-beta (published) | 7.34 | 90.60 | 62.03 | 61.07 |" in text
    assert "* us: AlpacaEval (alpaca_eval_gpt4): model abcdef012345, temperature 0.7" in rest
    assert "* us: lm-eval: model abc, model_dtype float32" in rest
    numbers = json.loads((files / "t.json").read_text())
    assert numbers["ours"][0]["numbers"]["ARC"]["value"] == 50
    assert (files / "t.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "table", *paths, f"--output={files}/a.md"])
    assert json.loads((files / "a.json").read_text()) == ALPACA


def test_a_part_of_a_task_is_no_result_of_the_task(files):
    partly = HARNESS | {"config": {**HARNESS["config"], "limit": 10, "apply_chat_template": True}}
    partly["n-shot"] = HARNESS["n-shot"] | {"arc_challenge": 0}
    (files / "h.json").write_text(json.dumps(partly))
    (entry,) = read_results([files / "h.json"])
    assert "MMLU, first 10, chat template" in entry.numbers
    assert "arc_challenge acc_norm none (0), first 10, chat template" in entry.numbers
    assert not {"ARC", "MMLU"} & set(entry.numbers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no result of evaluate: KeyError('kind')"),
        (json.dumps(ALPACA | {"numbers": {"win_rate": {"value": "50"}}}), "50, None and None are"),
        (json.dumps(ALPACA | {"numbers": {"win_rate": {"value": 5, "low": 4}}}), "5, 4 and None"),
        (json.dumps(ALPACA), "has AlpacaEval (alpaca_eval_gpt4) of us, as an earlier file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(files, refused, content, message):
    (files / "x.json").write_text(content)
    assert message in refused("evaluate", "table", f"{files}/a.json", f"{files}/x.json")
