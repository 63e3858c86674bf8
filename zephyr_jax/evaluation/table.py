"""Result files next to the numbers that the Zephyr paper and its model cards publish; figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from zephyr_jax.evaluation.evaluate import MAIN
from zephyr_jax.storage import atomic_path, read_checked, write_atomic
from zephyr_jax.weights.exports import plain

# Tunstall et al. 2023, arXiv:2310.16944, tables 1 and 2, and zephyr-7b-beta's leaderboard card.
_MT, _ALPACA = "MT-Bench (gpt-4)", "AlpacaEval (alpaca_eval_gpt4)"
_LM = ("ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K")
_PAPER: dict[str, tuple[float | None, float | None]] = {
    "Zephyr-7B-beta": (7.34, 90.60),
    "Zephyr-7B-alpha": (6.88, 85.76),
    "Mistral-Instruct-7B": (6.84, None),
    "Xwin-LM-7B": (6.19, 87.83),
    "StableLM-alpha-7B": (2.75, None),
    "MPT-Chat-7B": (5.42, None),
    "Falcon-40B-instruct": (5.17, 45.71),
    "Guanaco-65B": (6.41, 71.80),
    "Llama-2-70B-chat": (6.86, 92.66),
    "Vicuna-33B": (7.12, 88.99),
    "WizardLM-70B": (7.71, None),
    "Xwin-LM-70B": (None, 95.57),
    "GPT-3.5-turbo": (7.94, 89.37),
    "Claude 2": (8.06, 91.36),
    "GPT-4": (8.99, 95.28),
}
_CARD = dict(zip(_LM, (62.03, 84.36, 61.07, 57.45, 77.74, 12.74), strict=True))  # of the first
SUITES = {  # of each task: lm-eval's name, examples, and the leaderboard's metric
    "open_llm_leaderboard_v1": (
        ("arc_challenge", 25, "acc_norm,none"),
        ("hellaswag", 10, "acc_norm,none"),
        ("mmlu", 5, "acc,none"),
        ("truthfulqa_mc2", 0, "acc,none"),
        ("winogrande", 5, "acc,none"),
        ("gsm8k", 5, "exact_match,strict-match"),
    )
}
_TASKS = dict(zip(SUITES["open_llm_leaderboard_v1"], _LM, strict=True))  # -> the column
_SETTINGS = ("dtype", "max_length", "max_prompt_length", "beta", "reference", "step")
_OF_HARNESS = ("model_dtype", "apply_chat_template", "fewshot_as_multiturn", "limit")
_OF_HARNESS += ("system_instruction",)


@dataclasses.dataclass
class Number:
    """A value, and its 95% interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = () if self.low is None and self.high is None else (self.low, self.high)
        if not all(isinstance(x, int | float) for x in (self.value, *ends)):
            raise TypeError(f"{self.value}, {self.low} and {self.high} are no numbers")

    def __str__(self) -> str:
        text = f"{self.value:.4g}" if abs(self.value) < 1 else f"{self.value:.2f}"
        return text if self.low is None else f"{text} ({self.low:.2f} to {self.high:.2f})"


@dataclasses.dataclass
class Entry:
    """A row: a model's numbers by column, and of ours how each came about."""

    model: str
    numbers: dict[str, Number]
    settings: list[str]  # empty for published numbers


def run(args: argparse.Namespace) -> tuple[str, None]:
    """The table of result files as Markdown; with --output also in three files."""
    ours = read_results(args.results)
    head, *rows = table_rows(ours)
    lines = [f"| {' | '.join(map(plain, row))} |" for row in [head, *rows]]
    lines.insert(1, f"|{'---|' * len(head)}")
    notes = [f"* {plain(entry.model)}: {plain(text)}" for entry in ours for text in entry.settings]
    below = "Intervals are 95%. Published numbers come without one."
    text = "\n".join([*lines, "", below, *notes, ""])
    if args.output:
        read = [Path(path).resolve() for path in args.results]
        if args.output.suffix != ".md" or args.output.with_suffix(".json").resolve() in read:
            rule = "must end in .md, and its .json be none of the results"
            raise ValueError(f"--output={args.output} names the Markdown file: it {rule}")
        write_atomic(args.output, text)
        tables = {"ours": ours, "published": published()}
        numbers = {kind: [*map(dataclasses.asdict, rows)] for kind, rows in tables.items()}
        write_atomic(args.output.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")
        _draw_table(ours, args.output.with_suffix(".png"))
    return text, None


def read_results(paths: Sequence[str | os.PathLike[str]]) -> list[Entry]:
    """The rows of result files, a model's together; a ValueError names a file that is none."""
    entries: dict[str, Entry] = {}
    for path in paths:
        try:
            found = list(_entries(read_checked(path)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no result of evaluate: {error!r:.120}") from error
        for model, numbers, settings in found:
            entry = entries.setdefault(model, Entry(model, {}, []))
            if both := sorted(set(entry.numbers) & set(numbers)):
                has = f"{path} has {', '.join(both)} of {model}"
                raise ValueError(f"{has}, as an earlier file; name one")
            entry.numbers.update(numbers)
            entry.settings.append(settings)
    return list(entries.values())


def _entries(result: dict[str, Any]) -> Any:
    if "results" in result:  # lm-eval's own
        config = result["config"]
        settings = {name: config[name] for name in _OF_HARNESS if config.get(name)}
        text = _text("lm-eval", config.get("model_digest"), settings)
        yield config["model"], _harness_numbers(result), text
        return
    kind, rows = result["kind"], result.get("models", [result])
    if kind == "alpaca-eval":
        name = _ALPACA.replace("alpaca_eval_gpt4", result["annotator"])
        name += {"text_davinci_003": ""}.get(result["baseline"], f" against {result['baseline']}")
        columns = {"win_rate": name, "length_controlled_winrate": f"{name}, length-controlled"}
    elif kind.startswith("mt-bench"):
        name = _MT.replace("gpt-4", result["judge"])
        name = name if kind == "mt-bench" else name.replace("MT-Bench", "MT-Bench pairs")
        columns = {"score": name}
    else:
        name = ", ".join(part["name"] for part in result["sets"])
        columns = {column: f"{column} on {name}" for column in MAIN}
    for row in rows:
        own = row["numbers"]
        settings = row.get("settings") or {x: row[x] for x in _SETTINGS if x in row}
        numbers = {columns[x]: Number(**own[x]) for x in columns if x in own}
        yield str(row["model"]), numbers, _text(name, row.get("digest"), settings)


def _harness_numbers(result: dict[str, Any]) -> dict[str, Number]:
    """The numbers in lm-eval's own result; those inside a group are in the group's."""
    inside = {task for tasks in result.get("group_subtasks", {}).values() for task in tasks}
    limit, numbers = result["config"].get("limit"), {}
    other = "" if limit is None else f", first {limit}"  # than the leaderboard's measurement
    other += ", chat template" if result["config"].get("apply_chat_template") else ""
    for task, row in result["results"].items():
        shots = result["n-shot"].get(task, 0)
        official = [key for key in _TASKS if key[:2] == (task, shots)]
        for name, value in row.items():
            metric, _, which = name.partition(",")
            key = (task, shots, name)
            wanted = task not in inside and (not official or key in official)
            if not wanted or not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            column = _TASKS.get(key, f"{task} {metric} {which} ({shots})")
            scale = 100 if key in _TASKS else 1
            error = row.get(f"{metric}_stderr,{which}")
            half = 1.96 * error if isinstance(error, float) else None
            ends = () if half is None else (scale * (value - half), scale * (value + half))
            numbers[column + other] = Number(scale * value, *ends)
    return numbers


def _text(what: str, digest: str | None, settings: dict[str, Any]) -> str:
    words = [f"model {digest[:12]}" if digest else "a model of unknown digest"]
    words += [f"{name} {value}" for name, value in settings.items() if value not in ("", None)]
    return f"{what}: {', '.join(words)}"


def published() -> list[Entry]:
    """The numbers of others, as published."""
    entries = []
    for model, (score, rate) in _PAPER.items():
        values = {_MT: score, _ALPACA: rate} | ({} if entries else _CARD)
        numbers = {column: Number(x) for column, x in values.items() if x is not None}
        entries.append(Entry(f"{model} (published)", numbers, []))
    return entries


def columns_of(ours: Sequence[Entry]) -> list[str]:
    """The columns of our rows; those that published rows have as well come first."""
    own = dict.fromkeys(column for entry in ours for column in entry.numbers)
    shared = [column for column in (_MT, _ALPACA, *_LM) if column in own]
    return [*shared, *(column for column in own if column not in shared)]


def table_rows(ours: Sequence[Entry]) -> list[list[str]]:
    """The table as text, its head first; published rows that share no column are left out."""
    columns = columns_of(ours)
    shared = [x for x in published() if set(x.numbers) & set(columns)]
    rows = [[x.model, *(str(x.numbers.get(c, "")) for c in columns)] for x in [*ours, *shared]]
    return [["model", *columns], *rows]


def _draw_table(ours: Sequence[Entry], path: Path) -> None:
    """A panel for each column of the table: our numbers with intervals, then the published ones."""
    columns = columns_of(ours)
    height = 1 + 0.3 * len([*ours, *published()])
    figure = Figure(figsize=(6 * len(columns), height), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        rows = [x for x in [*ours, *published()] if column in x.numbers][::-1]
        colors = ["tab:blue" if x.settings else "tab:gray" for x in rows]
        axis.barh(range(len(rows)), [x.numbers[column].value for x in rows], color=colors)
        for at, row in enumerate(rows):
            ends = row.numbers[column].low, row.numbers[column].high
            axis.plot(ends, [at, at], color="black")  # None draws nothing
        axis.set_yticks(range(len(rows)), [x.model for x in rows])
        axis.set_title(column, fontsize=9)
    _save(figure, path)


def draw_radar(result: dict[str, Any], path: Path) -> bool:
    """MT-Bench's categories as a radar plot, a line for each of up to eight models; False: none."""
    models = result["models"][:8]
    names = [name for name in models[0]["numbers"] if name not in ("score", "turn_1", "turn_2")]
    if len(names) < 3:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(names) for i in range(len(names) + 1)]
    for model in models:
        values = [model["numbers"].get(name, {"value": 0.0})["value"] for name in names]
        axis.plot(angles, [*values, values[0]], label=model["model"])
    axis.set_xticks(angles[:-1], names)
    axis.set_ylim(0, 1 if result["kind"] != "mt-bench" else 10)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)
    return True


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", dpi=120)
