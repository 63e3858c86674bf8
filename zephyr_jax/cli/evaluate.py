"""Measures a model: on prepared sets, and by the benchmarks that chat models are compared with.

docs/evaluation.md defines every number. Each kind has its own flags: evaluate KIND --help.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from absl import logging

from zephyr_jax.cli import flags

_KINDS = {
    "sets": "perplexity of dialogues, and how often the chosen answer of a pair wins",
    "lm-eval": "tasks of EleutherAI's harness, such as MMLU and GSM8K",
    "mt-bench": "scores of two-turn answers, by a judge",
    "alpaca-eval": "win rate against another model's outputs",
    "table": "result files next to published numbers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the kinds and their flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(_KINDS))
    declared = _add_sets, _add_lm_eval, _add_mt_bench, _add_alpaca_eval, _add_table
    for kind, declare in zip(_KINDS, declared, strict=True):
        words = {"help": _KINDS[kind], "description": declare.__doc__, "allow_abbrev": False}
        declare(kinds.add_parser(kind, **words))


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    runs = _sets, _lm_eval, _mt_bench, _alpaca_eval, _table
    dict(zip(_KINDS, runs, strict=True))[args.kind](args)


def _add_sets(parser: argparse.ArgumentParser) -> None:
    """Scores a prepared set by a model: perplexity, and of pairs how often the chosen answer wins.

    Dialogues give nats per target token and perplexity; pairs log-likelihood accuracy, and with
    --reference implicit rewards, margins and the KL divergence. Every number has a 95% bootstrap
    interval. All of it goes to --output as JSON; without that it is the last line on stdout.
    """
    add, at_least = parser.add_argument, flags.at_least
    flags.add_model(parser)
    add("--dataset", required=True, help='such as ultrafeedback/binarized; several: "A, B"')
    flags.add_data_dir(parser, default="data", help="where prepare_data put the sets (data)")
    flags.add_split(parser, default="", help="default: the set's held-out split")
    flags.add_limit(parser, "only the first N records of each set")
    add("--reference", metavar="MODEL", help="reference for implicit rewards and KL (pairs only)")
    add("--beta", type=float, help="scale of the implicit rewards (0.1)")
    _add_shape(parser)
    longest = "tokens of a dialogue (seq_len), or of a prompt and its longer answer (half of it)"
    add("--max_length", type=at_least(2), help=longest)
    prompt = "tokens of a longer pair's prompt (max_length / 2)"
    add("--max_prompt_length", type=at_least(1), help=prompt)
    samples = "bootstrap samples (1000)"
    add("--bootstrap", type=at_least(100), default=1000, metavar="SAMPLES", help=samples)
    flags.add_output(parser, "the numbers as JSON")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """Declares the size of a batch of packed rows, and the mesh."""
    at_least = flags.at_least
    parser.add_argument("--seq_len", type=at_least(2), default=2048, help="tokens in a row (2048)")
    flags.add_rows(parser, type=at_least(1), help="rows in a batch (8, rounded up to data x fsdp)")
    flags.add_mesh(parser)


def _sets(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation.evaluate import evaluate, result_table

    with flags.all_devices(args.tensor, args.fsdp):
        result = evaluate(args)
    sys.stdout.write(f"{result_table(result)}\n")
    _write(args, result)


def _add_lm_eval(parser: argparse.ArgumentParser) -> None:
    """Runs tasks of EleutherAI's lm-eval on our model: pip install 'zephyr_jax[lm-eval]'.

    The output is lm-eval's own JSON. --suite=open_llm_leaderboard_v1 is ARC (25 examples),
    HellaSwag (10), MMLU (5), TruthfulQA (0), Winogrande (5) and GSM8K (5).
    """
    flags.add_model(parser)
    add = parser.add_argument
    add("--tasks", default="", help='names, groups or patterns: "mmlu, gsm8k"')
    add("--suite", choices=("open_llm_leaderboard_v1",), default="", help="a set of tasks")
    add("--include_path", metavar="FOLDER", help="a folder with the YAML files of further tasks")
    add("--num_fewshot", type=flags.at_least(0), metavar="N", help="examples (each task's own)")
    chat = "the model's chat template, with examples in one turn or each as a turn of its own"
    add("--chat_template", choices=("off", "one_turn", "multiturn"), default="off", help=chat)
    flags.add_system(parser)
    flags.add_limit(parser, "only the first N documents of each task")
    _add_shape(parser)
    flags.add_output(parser, "lm-eval's results as JSON")


def _lm_eval(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation.lm_harness import evaluate_tasks, harness_model

    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks and not args.suite:
        raise ValueError("name --tasks or a --suite")
    if args.suite and args.num_fewshot is not None and not tasks:
        raise ValueError(f"--suite={args.suite} has its own numbers of examples")
    options: dict[str, Any] = {"num_fewshot": args.num_fewshot, "limit": args.limit}
    options["system_instruction"] = args.system or None
    options["apply_chat_template"] = args.chat_template != "off"
    options["fewshot_as_multiturn"] = args.chat_template == "multiturn"
    with flags.all_devices(args.tensor, args.fsdp):
        lm = harness_model(flags.load(args), args.model, args.seq_len, args.rows)
        results = evaluate_tasks(lm, tasks, args.suite, args.include_path, **options)
    table = importlib.import_module("lm_eval.utils").make_table(results)
    sys.stdout.write(f"{table}\n")
    _write(args, results)


def _add_mt_bench(parser: argparse.ArgumentParser) -> None:
    """MT-Bench: two-turn answers, a judge's scores or, with --baseline, comparisons in both orders.

    --questions is a folder with FastChat's question.jsonl, judge_prompts.jsonl and reference
    answers. --model writes --answers at each category's temperature; --judge judges --answers and
    adds to --judgments; --judgments alone, recorded anywhere, give the scores (by category with
    --questions). All files have FastChat's formats. The key is read from OPENAI_API_KEY.
    """
    _add_judging(parser, max_new_tokens=1024, temperature=None)
    verdicts = "verdicts to read; --judge adds to them"
    parser.add_argument("--judgments", metavar="FILE.jsonl", help=verdicts)


def _mt_bench(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation import mt_bench
    from zephyr_jax.evaluation.answers import Judge
    from zephyr_jax.evaluation.evaluate import metric_table
    from zephyr_jax.evaluation.table import draw_radar

    _check_flags(args, "judgments", "questions")
    questions, facts, failed = mt_bench.Questions([], {}, {}), {}, {}
    if args.questions:
        questions = mt_bench.read_questions(Path(args.questions), args.limit)
    if args.model:
        answer = functools.partial(mt_bench.answer, temperature=args.temperature)
        _write_answers(args, answer, questions.rows)
        if not args.judge:
            return
    path = Path(args.judgments)
    if args.judge:
        judge = Judge(args.judge, args.base_url)
        baseline = Path(args.baseline) if args.baseline else None
        mt_bench.judge_answers(questions, judge, path, Path(args.answers), baseline)
        failed = dict(judge.failed)
    if args.answers:
        facts = mt_bench.read_answers(Path(args.answers))[1]
    result = mt_bench.scores(mt_bench.read_judgments(path), questions.categories, facts)
    result["failed_requests"] = failed
    for model in result["models"]:
        counts = f"{model['judgments']} judgments by {result['judge']}"
        counts += f", {model['unreadable']} unreadable"
        sys.stdout.write(f"{model['model']}: {counts}\n{metric_table(model['numbers'])}\n\n")
    _write(args, result)
    if args.output and draw_radar(result, args.output.with_suffix(".png")):
        logging.info("%s", args.output.with_suffix(".png"))


def _add_alpaca_eval(parser: argparse.ArgumentParser) -> None:
    """AlpacaEval: the model's outputs, a judge's verdicts against a baseline, and the win rate.

    --model with --questions writes --answers; --judge with --baseline compares --answers with
    it and writes --annotations; --annotations alone, recorded anywhere, give the win rate. All
    files have AlpacaEval's own formats. The key of an endpoint is read from OPENAI_API_KEY.
    """
    _add_judging(parser, max_new_tokens=2048, temperature=0.7)
    verdicts = "verdicts to read, or with --judge to write"
    parser.add_argument("--annotations", metavar="FILE.json", help=verdicts)


def _add_judging(
    parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float | None
) -> None:
    """Declares what makes a model's answers, and who judges them against what."""
    flags.add_model(parser, required=False)
    flags.add_name(parser, "the model's name in files (default: last part of --model)")
    add = parser.add_argument
    add("--questions", metavar="PATH", help="instructions, or a folder of MT-Bench's files")
    flags.add_limit(parser, "only the first N questions")
    add("--answers", metavar="FILE", help="the model's answers: written with --model, else read")
    flags.add_system(parser)
    flags.add_sampling(parser, max_new_tokens=max_new_tokens)
    parser.set_defaults(temperature=temperature, top_k=0, top_p=1.0)
    flags.add_seed(parser)
    flags.add_rows(parser, type=flags.at_least(1), default=8, help="answers at a time (8)")
    flags.add_mesh(parser)
    add("--baseline", metavar="FILE", help="answers of the model to compare with")
    add("--judge", metavar="NAME", help="model behind an OpenAI-compatible endpoint")
    add("--base_url", metavar="URL", help="its address (OPENAI_BASE_URL, or OpenAI's own)")
    flags.add_output(parser, "the numbers as JSON")


def _check_flags(args: argparse.Namespace, verdicts: str, judged: str) -> None:
    """Raises a ValueError if a flag lacks another, without which it does nothing."""
    recorded = getattr(args, verdicts)
    needs = (
        (args.model, "--model", ("questions", "answers")),
        (args.judge, "--judge", ("answers", judged, verdicts)),
        (args.baseline, "--baseline", ("judge",)),
        (args.base_url, "--base_url", ("judge",)),
        (args.model and recorded, f"--{verdicts} with --model", ("judge",)),
        (not args.model and not args.judge, args.kind, (verdicts,)),
    )
    for used, flag, others in needs:
        absent = [f"--{name}" for name in others if getattr(args, name) is None]
        if used and absent:
            raise ValueError(f"{flag} needs {' and '.join(absent)}")


def _write_answers(args: argparse.Namespace, answer: Any, questions: list[Any]) -> None:
    """Writes the answers of --model to --answers; `answer` is the kind's function for them."""
    from zephyr_jax.evaluation.answers import Answering, write_rows
    from zephyr_jax.inference.sampling import SamplingParams

    sampling = flags.sampling_settings(args) | {"seed": args.seed}
    sampling["temperature"] = args.temperature or 0.0
    answering = Answering(SamplingParams(**sampling), args.rows, args.system)
    name = args.name or Path(args.model).name
    with flags.all_devices(args.tensor, args.fsdp):
        write_rows(args.answers, answer(flags.load(args), questions, name, answering))
    logging.info("%d answers in %s", len(questions), args.answers)


def _alpaca_eval(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation import alpaca_eval as alpaca
    from zephyr_jax.evaluation.answers import Judge, read_rows

    _check_flags(args, "annotations", "baseline")
    unique = ("instruction",)
    if args.model:
        questions = read_rows(args.questions, {"instruction": str}, unique)[: args.limit]
        _write_answers(args, alpaca.model_outputs, questions)
        if not args.judge:
            return
    failed: dict[str, int] = {}
    if args.judge:
        both = (read_rows(path, alpaca.OUTPUT, unique) for path in (args.answers, args.baseline))
        judge = Judge(args.judge, args.base_url)
        rows = alpaca.annotate(alpaca.pair_outputs(*both), judge, Path(args.annotations))
        failed = dict(judge.failed)
    else:
        rows = read_rows(args.annotations, alpaca.ANNOTATION, unique)
    result = alpaca.win_rate(rows) | alpaca.length_controlled(rows) | {"failed_requests": failed}
    rate, (low, high) = result["win_rate"], result["interval"]
    sys.stdout.write(
        f"{result['model']} wins {rate:.2f} +- {result['standard_error']:.2f}% (95%: {low:.2f} to "
        f"{high:.2f}) of {result['n_total']} against {result['baseline']} by {result['annotator']};"
        f" {result['n_without_preference']} without a preference, {sum(failed.values())} failed\n"
    )
    _write(args, result)


def _add_table(parser: argparse.ArgumentParser) -> None:
    """A table of result files (--output of the other kinds) next to published numbers.

    It goes to stdout; with --output=FILE.md to that file, the numbers to FILE.json, a figure to
    FILE.png.
    """
    parser.add_argument("results", nargs="+", help="result files; a model's share a row")
    flags.add_output(parser, "the table, next to it .json and .png", metavar="FILE.md")


def _table(args: argparse.Namespace) -> None:
    from zephyr_jax.evaluation import table
    from zephyr_jax.storage import write_atomic

    ours = table.read_results(args.results)
    text = table.markdown(ours)
    sys.stdout.write(text)
    if args.output:
        if args.output.suffix in (".json", ".png"):
            raise ValueError(f"--output={args.output} names the Markdown file; use .md")
        write_atomic(args.output, text)
        numbers = json.dumps(table.as_json(ours), indent=1) + "\n"
        write_atomic(args.output.with_suffix(".json"), numbers)
        table.draw_table(ours, args.output.with_suffix(".png"))
        logging.info("%s", args.output)


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes the result to --output, or else as the last line on stdout."""
    from zephyr_jax.storage import write_atomic

    if args.output:
        logging.info("%s", write_atomic(args.output, json.dumps(result, indent=1) + "\n"))
    else:
        sys.stdout.write(f"\n{json.dumps(result)}\n")
