"""Replies of a model: to one prompt, to a file of prompts, or in a chat.

A line of --prompts is {"prompt": "..."} or {"messages": [...]}; the output repeats it with "reply".
Where the last message is the assistant's, the reply is what follows it in the same message.
A reply depends on its line, the line's number and the seed, not on --batch_size. Several devices
replicate the weights and share the rows, unless --tensor or --fsdp shard the weights over them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from absl import logging
from tqdm import tqdm

from zephyr_jax.cli import flags
from zephyr_jax.storage import atomic_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn")
    what.add_argument("--prompts", metavar="FILE.jsonl", help="a file of prompts")
    what.add_argument("--chat", action="store_true", help="chat in the terminal; /help lists more")
    add = parser.add_argument
    flags.add_output(parser, "file for the replies to --prompts", metavar="FILE.jsonl")
    flags.add_system(parser)
    flags.add_sampling(parser, max_new_tokens=256)
    add("--stop", action="append", default=[], help="stop string (repeatable)")
    flags.add_seed(parser)
    at_once = "prompts of the file to answer at once"
    add("--batch_size", type=flags.at_least(1), default=16, help=at_once)
    flags.add_mesh(parser)


def run(args: argparse.Namespace) -> None:
    from zephyr_jax.inference import generate as generation
    from zephyr_jax.inference.chat import Chat, read_lines
    from zephyr_jax.inference.sampling import SamplingParams
    from zephyr_jax.weights.sources import load_in

    if (args.prompts is None) != (args.output is None):
        raise ValueError("--prompts and --output belong together; give both or neither")
    if args.prompts and Path(args.prompts).resolve() == args.output.resolve():
        raise ValueError(f"--prompts and --output are both {args.output}; name another --output")
    system = [{"role": "system", "content": args.system}] if args.system else []
    lines = [] if args.prompts is None else read_lines(Path(args.prompts), system)
    if begun := sum(line.messages[-1]["role"] == "assistant" for line in lines):
        message = "%d of %d conversations end with an answer, which is continued"
        logging.warning(message, begun, len(lines))
    if replaced := sum("reply" in line.row for line in lines):
        logging.warning("the reply that %d of %d lines have is replaced", replaced, len(lines))
    sampling = SamplingParams(**flags.sampling_settings(args), stop=args.stop, seed=args.seed)
    with flags.all_devices(args.tensor, args.fsdp):
        cfg, params, tok, _ = load_in(args.model, args.dtype)
        if args.chat:
            Chat((cfg, params, tok), sampling, system).talk()
        elif args.prompt is not None:
            chat = [*system, {"role": "user", "content": args.prompt}]
            sys.stdout.write(generation.generate(cfg, params, tok, [chat], sampling)[0] + "\n")
        else:
            prompts = []
            for line in lines:  # all, before the first reply
                try:
                    prompts.append(generation.prompt_ids(tok, line.messages))
                    generation.check_ids(cfg, prompts[-1], "the conversation")
                except ValueError as error:
                    raise ValueError(f"{line.place}: {error}") from error
            inputs = cfg, params, tok, prompts, sampling
            with atomic_path(args.output) as path, path.open("w", encoding="utf-8") as file:
                each = generation.generate_each(*inputs, args.batch_size)
                replies = dict(tqdm(each, total=len(lines), unit="prompt"))
                for i, line in enumerate(lines):
                    row = line.row | {"reply": replies[i]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            logging.info("%d replies in %s", len(lines), args.output)
