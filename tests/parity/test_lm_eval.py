"""Our model in lm-eval against lm-eval's own `hf` model on the exported folder, request by request.

Tolerance: 1e-4 nats a request, both in float32; and 1e-7 of it, since `hf` adds in float32 up to
thousands of nats, where its last digit is 5e-4.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.evaluation.lm_harness import evaluate_tasks, find_tasks, harness_model
from zephyr_jax.weights.checkpoint import Model

pytestmark = pytest.mark.parity
LENGTH, TOLERANCE = 96, 1e-4
TEXT = "Grandmother keeps seven red boxes in the kitchen, and nobody knows what is in them. "


def instances(kind, arguments):
    module = pytest.importorskip("lm_eval.api.instance", reason="pip install zephyr_jax[lm-eval]")
    return [module.Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def hf_model(folder):
    pytest.importorskip("torch", reason="comes with make parity")
    module = pytest.importorskip("lm_eval.models.huggingface", reason="comes with make parity")
    return module.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def both(tok, tmp_path_factory):
    """Our model and `hf`, of the same weights, with a window shorter than the contexts."""
    sizes = {"max_position_embeddings": LENGTH, "sliding_window": 40, "initializer_range": 0.2}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=380, dtype="float32", **sizes)
    params = random_params(cfg)
    folder = tmp_path_factory.mktemp("hf") / "model"
    zj.export_hf(cfg, params, tok, folder, dtype="float32")
    return harness_model(Model(cfg, params, tok, {}), str(folder), 256, 2), hf_model(folder)


CHAT = [
    {"role": "system", "content": "You count boxes."},
    {"role": "user", "content": "How many boxes?"},
    {"role": "assistant", "content": "Seven. "},
]


def contexts(lm, chat):
    plain = ["What is in the box?", TEXT * 5, "Answer: ", "the kit", f"{TEXT}\n\nQ:"]
    plain += ["", "</s>x", "é"]
    if not chat:
        return plain
    turns = [{"role": "user", "content": text} for text in plain if text]
    texts = [lm.apply_chat_template([turn]) for turn in turns]
    return [*texts, lm.apply_chat_template(CHAT, add_generation_prompt=False)]


@pytest.mark.parametrize("chat", [False, True])
def test_every_kind_of_request_is_answered_as_by_hf(both, chat, monkeypatch):
    ours, theirs = both
    texts = contexts(ours, chat)
    assert texts == contexts(theirs, chat)
    choices = [" seven red boxes", " seven", "chen is red", "\nnothing", " in them. " * 3]
    pairs = [(text, choice) for text in texts for choice in choices]
    pairs += [(TEXT * 9, " nobody"), ("x", TEXT[:40]), pairs[0]]
    requests = instances("loglikelihood", pairs)
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose(
        [x for x, _ in found], [x for x, _ in wanted], rtol=0, atol=TOLERANCE
    )
    assert [x for _, x in found] == [x for _, x in wanted]

    whole = instances("loglikelihood_rolling", [(text,) for text in [*texts, TEXT * 12] if text])
    found, wanted = ours.loglikelihood_rolling(whole), theirs.loglikelihood_rolling(whole)
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=TOLERANCE)

    # A random model writes broken characters, whose bytes `tokenizers` replaces one by one.
    decode = theirs.tok_decode
    ids = lambda x, **more: decode(x, **more) if isinstance(x, int) else ours._tok.decode(x)  # noqa: E731
    monkeypatch.setattr(theirs, "tok_decode", ids)
    settings = [{"until": ["\n", "Q:"], "max_gen_toks": 12}, {"until": "e", "do_sample": False}]
    settings[1]["max_gen_toks"] = 20
    calls = [(text, dict(x)) for text in texts if text for x in settings]
    replies = [lm.generate_until(instances("generate_until", calls)) for lm in (ours, theirs)]
    assert replies[0] == replies[1]


# Tasks in the shape of MMLU, TruthfulQA and GSM8K
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


def made_up(folder):
    """Small tasks of every kind; their names."""
    words = TEXT.split()
    questions = [
        {"question": f"{TEXT} {word}?", "choices": words[i : i + 4], "answer": i % 4}
        for i, word in enumerate(words[:8])
    ]
    write_task(folder, "little_mmlu", MMLU, questions[:5], questions[5:] * 2)
    answers = [{"question": x["question"], "choices": [TEXT, TEXT[9:], "no"]} for x in questions]
    write_task(folder, "little_truthfulqa", TRUTHFUL, answers)
    problems = [
        {"question": x["question"], "answer": f"it is #### {i}"} for i, x in enumerate(answers)
    ]
    write_task(folder, "little_gsm8k", GSM8K, problems[:3], problems[3:], most=8)
    write_task(folder, "little_rolling", ROLLING, [{"text": TEXT * n} for n in (1, 4)])
    return ["little_mmlu", "little_truthfulqa", "little_gsm8k", "little_rolling"]


def metrics(results):
    return {
        (task, name): value
        for task, row in results["results"].items()
        for name, value in row.items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("chat", ["off", "multiturn"])
def test_tasks_give_the_numbers_of_hf_for_fewer_tokens(both, tmp_path, monkeypatch, chat):
    names, (ours, theirs) = made_up(tmp_path), both
    theirs.usage, call = {"tokens": 0}, theirs._model_call

    def counted(inputs, **more):
        theirs.usage["tokens"] += inputs.numel()
        return call(inputs, **more)

    monkeypatch.setattr(theirs, "_model_call", counted)
    on = dict.fromkeys(("apply_chat_template", "fewshot_as_multiturn"), chat != "off")
    wanted = evaluate_tasks(theirs, find_tasks(names, str(tmp_path)), names, **on)
    words = f"--model={ours._name} --include_path={tmp_path} --seq_len=256 --dtype=float32"
    words += f" --tasks=little_* --output={tmp_path}/out.json --chat_template={chat}"
    main(["evaluate", "lm-eval", *words.split()])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"].keys() == wanted["results"].keys() == set(names)
    assert metrics(found) == pytest.approx(metrics(wanted), rel=1e-4, nan_ok=True)
    # Not half as many here: contexts that are cut on the left begin differently.
    assert 0 < found["config"]["usage"]["tokens"] < theirs.usage["tokens"]
    assert len(found["config"]["model_digest"]) == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [("--tasks=nonsense", "lm-eval has no task nonsense"), ("--limit=3", "name --tasks or")],
)
def test_tasks_are_looked_for_before_the_model_is_loaded(refused, words, message):
    assert message in refused("evaluate", "lm-eval", "--model=nowhere", words)
