"""Local tasks of lm-eval in the shape of MMLU, TruthfulQA and GSM8K, from files or made up."""

import csv
import json
from pathlib import Path

_WITH_EXAMPLES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}_test.jsonl, dev: {folder}/{name}_dev.jsonl}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
"""
MMLU = (
    _WITH_EXAMPLES
    + """\
output_type: multiple_choice
num_fewshot: 5
description: "The following are multiple choice questions (with answers).\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
"""  # noqa: E501
)
TRUTHFUL = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/{name}_test.jsonl}}}}
validation_split: validation
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: choices
doc_to_target: 0
"""
GSM8K = (
    _WITH_EXAMPLES
    + """\
output_type: generate_until
num_fewshot: 2
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, max_gen_toks: {most}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
"""  # noqa: E501
)
ROLLING = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}_test.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def write_task(folder: Path, name: str, yaml: str, test: list, dev: list = (), **values) -> None:
    """A task's YAML and its documents."""
    for split, rows in (("test", test), ("dev", dev)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}_{split}.jsonl").write_text(text)
    (folder / f"{name}.yaml").write_text(yaml.format(name=name, folder=folder, **values))


def real_tasks(folder: Path, benchmarks: Path, limit: int, most: int = 32) -> list[str]:
    """Tasks from the public files of the benchmarks; their names."""

    def mmlu(path: Path) -> list:
        rows = list(csv.reader(path.read_text("utf-8-sig").splitlines()))[1:]
        return [{"question": r[0], "choices": r[1:5], "answer": int(r[5])} for r in rows]

    names = []
    for path in sorted((benchmarks / "mmlu").glob("*_test.csv")):
        name = f"local_mmlu_{path.name.removesuffix('_test.csv')}"
        dev = mmlu(path.with_name(path.name.replace("_test", "_dev")))
        write_task(folder, name, MMLU, mmlu(path)[:limit], dev)
        names.append(name)
    with (benchmarks / "truthfulqa.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))[:limit]
    split = lambda text: [x.strip() for x in text.split(";") if x.strip()]  # noqa: E731
    choices = [split(f"{row['Correct Answers']};{row['Incorrect Answers']}") for row in rows]
    questions = [row["Question"] for row in rows]
    rows = [{"question": q, "choices": x} for q, x in zip(questions, choices, strict=True)]
    write_task(folder, "local_truthfulqa", TRUTHFUL, rows)
    lines = (benchmarks / "gsm8k_test.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines[-2:] + lines[:limit]]
    write_task(folder, "local_gsm8k", GSM8K, problems[2:], problems[:2], most=most)
    write_task(folder, "local_rolling", ROLLING, [{"text": x["question"]} for x in problems])
    return [*names, "local_truthfulqa", "local_gsm8k", "local_rolling"]
