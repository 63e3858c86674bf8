"""Replies of a model: to one prompt, to a file of prompts, or in a chat.

A line of --prompts is {"prompt": "..."} or {"messages": [...]}; the output repeats it with "reply".
What a line gets depends on the line, its number and the seed, not on --batch_size. With several
devices every one has all weights and a part of the rows, unless --tensor or --fsdp divide them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from zephyr_jax.cli import flags as mesh_flags
from zephyr_jax.cli import sampling_flags
from zephyr_jax.inference.prompt_files import Line, read_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder or hub id, GGUF, checkpoint or workdir"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn")
    what.add_argument("--prompts", help="a .jsonl of prompts")
    what.add_argument("--chat", action="store_true", help="talk; /help there, Ctrl-D ends")
    parser.add_argument("--output", help="where the replies of --prompts go (.jsonl)")
    parser.add_argument("--system", default="", help="a system message before the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    sampling_flags.add_arguments(parser)
    parser.add_argument("--stop", action="append", default=[], help="text that ends a reply; again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16, help="of --prompts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    mesh_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.prompts is not None and not args.output:
        raise ValueError("--prompts needs --output=FILE.jsonl")
    if args.output and args.prompts is None:
        raise ValueError("--output belongs to --prompts=FILE.jsonl")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1")
    system = [{"role": "system", "content": args.system}] if args.system else []
    lines: list[Line] = []
    if args.prompts is not None:
        if Path(args.prompts).is_dir():
            where = Path(args.prompts).absolute()
            raise ValueError(f"--prompts={args.prompts}: {where} is a folder; name a .jsonl file")
        lines = read_lines(Path(args.prompts), system)
        _check_output(Path(args.output))
    with mesh_flags.all_devices(args.tensor, args.fsdp):
        _run(args, system, lines)


def _run(args: argparse.Namespace, system: list[dict[str, str]], lines: list[Line]) -> None:
    import dataclasses

    from zephyr_jax.inference.decoding import Throughput
    from zephyr_jax.inference.generate import generate
    from zephyr_jax.weights.checkpoint import load_model

    model = load_model(args.model, dtype=args.dtype)
    cfg, tok = model.cfg, model.tokenizer
    if args.dtype:
        cfg = dataclasses.replace(cfg, dtype=args.dtype)
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "stop", "seed")}
    settings |= sampling_flags.of(args)
    if args.chat:
        _chat(args.system, model._replace(cfg=cfg), settings)
        return
    throughput = Throughput()

    def reply(prompts: list[Any], **more: Any) -> list[str]:
        return generate(cfg, model.params, tok, prompts, **settings, **more)

    if lines:
        prompts = [_ids(cfg, tok, line) for line in lines]  # all, before the first reply is made
        _batch(reply, lines, prompts, Path(args.output), args.batch_size, throughput)
    else:
        messages = [*system, {"role": "user", "content": args.prompt}]
        sys.stdout.write(reply([messages], throughput=throughput)[0] + "\n")
    logging.info("%s", throughput)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_file():
        what = "a folder" if output.is_dir() else "no plain file"
        raise ValueError(f"--output={output} is {what}; name a .jsonl file")
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: {output.parent} is not a folder; make it first")


def _ids(cfg: Any, tok: Any, line: Line) -> list[int]:
    """The token ids of a line's conversation, which the model has positions for."""
    from zephyr_jax.inference.generate import check_ids, prompt_ids

    try:
        ids = prompt_ids(tok, line.messages)
    except ValueError as error:
        raise ValueError(f"{line.place}: {error}") from error
    check_ids(cfg, ids, line.place)
    return ids


def _batch(
    reply: Any,
    lines: list[Line],
    prompts: list[list[int]],
    output: Path,
    size: int,
    throughput: Any,
) -> None:
    temporary = output.with_name(f".{output.name}.{os.getpid()}.new")
    try:
        with (
            temporary.open("w", encoding="utf-8") as file,
            tqdm(total=len(lines), unit="prompt") as bar,
        ):
            for at in range(0, len(lines), size):
                portion = lines[at : at + size]
                replies = reply(prompts[at : at + size], first_row=at, throughput=throughput)
                for line, text in zip(portion, replies, strict=True):
                    row = line.row | {"reply": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.set_postfix_str(f"{throughput.decode_rate:.0f} tok/s", refresh=False)
                bar.update(len(portion))
        os.replace(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    logging.info("%d replies in %s", len(lines), output)


def _chat(system: str, model: Any, settings: dict[str, Any]) -> None:
    from zephyr_jax.inference.chat import Chat, talk
    from zephyr_jax.inference.generate import generate, prompt_ids, stream

    cfg, params, tok = model.cfg, model.params, model.tokenizer

    def check(settings: dict[str, Any]) -> None:
        stream(cfg, params, tok, [tok.eos_id], **settings)  # which complains at the call

    check(settings)
    chat = Chat(
        reply=functools.partial(generate, cfg, params, tok),
        check=check,
        length=lambda messages: len(prompt_ids(tok, messages)),
        limit=cfg.max_position_embeddings,
        settings=settings,
        system=system,
    )
    talk(chat)
