"""Measures a model on prepared sets and by benchmarks; docs/evaluation.md defines every number."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

from absl import logging

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(_KINDS))
    for kind, (_, declare) in _KINDS.items():
        words = declare.__doc__ or ""
        first = words.splitlines()[0].rstrip(".")
        each = kinds.add_parser(kind, help=first, description=words, allow_abbrev=False)
        declare(each)
        flags.add_output(each, "the numbers as JSON; of a table FILE.md, next to it .json and .png")


def run(args: argparse.Namespace) -> None:
    """Prints the numbers; all of them go to --output as JSON, or else to the last line."""
    from zephyr_jax.storage import write_checked

    module = importlib.import_module(f"zephyr_jax.evaluation.{_KINDS[args.kind][0]}")
    sampled = getattr(args, "model", None)
    with flags.all_devices(args.tensor, args.fsdp) if sampled else contextlib.nullcontext():
        text, result = module.run(args)
    sys.stdout.write(text)
    if result and args.output:
        logging.info("%s", write_checked(args.output, result))
    elif result:
        sys.stdout.write(f"\n{json.dumps(result)}\n")


def _add_sets(parser: argparse.ArgumentParser) -> None:
    """Perplexity of dialogues, or how often the chosen answer of a pair wins, on prepared sets.

    Dialogues give nats per target token and perplexity; pairs log-likelihood accuracy, and with
    --reference implicit rewards, margins and the KL divergence, all with 95% bootstrap intervals.
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
    add("--max_prompt_length", type=at_least(1), help="tokens of its prompt (max_length / 2)")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    at_least = flags.at_least
    parser.add_argument("--seq_len", type=at_least(2), default=2048, help="tokens in a row (2048)")
    flags.add_rows(parser, type=at_least(1), help="rows in a batch (8, rounded up to data x fsdp)")
    flags.add_mesh(parser)


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


def _add_mt_bench(parser: argparse.ArgumentParser) -> None:
    """Two-turn answers, and a judge's scores or, with --baseline, comparisons in both orders.

    --questions is a folder with FastChat's question.jsonl, judge_prompts.jsonl and reference
    answers. --model writes --answers at each category's temperature; --judge judges --answers and
    adds to --judgments; --judgments alone, recorded anywhere, give the scores (by category with
    --questions). All files have FastChat's formats. The key is read from OPENAI_API_KEY.
    """
    _add_judging(parser, "judgments", max_new_tokens=1024, temperature=None)


def _add_alpaca_eval(parser: argparse.ArgumentParser) -> None:
    """Outputs to instructions, a judge's verdicts against a baseline's, and the win rate.

    --model with --questions writes --answers; --judge with --baseline compares --answers with
    it and writes --annotations; --annotations alone, recorded anywhere, give the win rate. All
    files have AlpacaEval's own formats. The key of an endpoint is read from OPENAI_API_KEY.
    """
    _add_judging(parser, "annotations", max_new_tokens=2048, temperature=0.7)


def _add_judging(
    parser: argparse.ArgumentParser, verdicts: str, max_new_tokens: int, temperature: float | None
) -> None:
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
    add(f"--{verdicts}", type=Path, metavar="FILE", help="verdicts to read; --judge adds to them")


def _add_table(parser: argparse.ArgumentParser) -> None:
    """A table of result files (--output of the other kinds) next to published numbers.

    It goes to stdout; with --output=FILE.md to that file, numbers to FILE.json, bars to FILE.png.
    """
    parser.add_argument("results", nargs="+", help="result files; a model's share a row")


_KINDS = {  # -> the module, and what declares the flags
    "sets": ("evaluate", _add_sets),
    "lm-eval": ("lm_harness", _add_lm_eval),
    "mt-bench": ("mt_bench", _add_mt_bench),
    "alpaca-eval": ("alpaca_eval", _add_alpaca_eval),
    "table": ("table", _add_table),
}
