"""Replies of a model: to one prompt, to a file of prompts, or in a chat.

A line of --prompts is {"prompt": "..."} or {"messages": [...]}; the output repeats it with "reply".
What a line gets depends on the line, its number and the seed, not on --batch_size. With several
devices every one has all weights and a part of the rows, unless --tensor or --fsdp divide them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from tqdm import tqdm

from zephyr_jax.commands import mesh_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder or hub id, GGUF, checkpoint or workdir"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn")
    what.add_argument("--prompts", help="a .jsonl of prompts")
    what.add_argument("--chat", action="store_true", help="talk; an empty line or Ctrl-D ends")
    parser.add_argument("--output", help="where the replies of --prompts go (.jsonl)")
    parser.add_argument("--system", default="", help="a system message before the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=0.95, help="1: all tokens")
    parser.add_argument("--min_p", type=float, default=0.0, help="0: all tokens")
    parser.add_argument("--stop", action="append", default=[], help="text that ends a reply; again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16, help="of --prompts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    mesh_flags.add_arguments(parser)


class _Line(NamedTuple):
    """A line of --prompts: where it stands, what it holds, and its conversation."""

    place: str
    row: dict[str, Any]
    messages: list[dict[str, str]]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.prompts is not None and not args.output:
        raise ValueError("--prompts needs --output=FILE.jsonl")
    if args.output and args.prompts is None:
        raise ValueError("--output belongs to --prompts=FILE.jsonl")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1")
    system = [{"role": "system", "content": args.system}] if args.system else []
    lines: list[_Line] = []
    if args.prompts is not None:
        lines = _read_prompts(args.prompts, system)
        _check_output(Path(args.output))
    with mesh_flags.all_devices(args.tensor, args.fsdp):
        _run(args, system, lines)


def _run(args: argparse.Namespace, system: list[dict[str, str]], lines: list[_Line]) -> None:
    import dataclasses

    from zephyr_jax.checkpoint import load_model
    from zephyr_jax.generation import generate, prompt_ids
    from zephyr_jax.models.decoding import Speed

    model = load_model(args.model, dtype=args.dtype)
    cfg, tok = model.cfg, model.tokenizer
    if args.dtype:
        cfg = dataclasses.replace(cfg, dtype=args.dtype)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed")
    settings = {name: getattr(args, name) for name in names}
    speed = Speed()

    def reply(prompts: list[Any], **more: Any) -> list[str]:
        return generate(cfg, model.params, tok, prompts, **settings, **more)

    if args.chat:
        limit = cfg.max_position_embeddings
        _chat(reply, system, limit, lambda messages: len(prompt_ids(tok, messages)) > limit)
        return
    if lines:
        prompts = [_ids(cfg, tok, line) for line in lines]  # all, before the first reply is made
        _batch(reply, lines, prompts, Path(args.output), args.batch_size, speed)
    else:
        messages = [*system, {"role": "user", "content": args.prompt}]
        sys.stdout.write(reply([messages], speed=speed)[0] + "\n")
    logging.info("%s", speed)


def _read_prompts(name: str, system: list[dict[str, str]]) -> list[_Line]:
    """The lines of --prompts that are not blank, each with a chat that can be rendered."""
    from zephyr_jax.data.chat import render_text

    path = Path(name)
    if path.is_dir():
        raise ValueError(f"--prompts={name}: {path.absolute()} is a folder; name a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    lines = []
    # Not splitlines: JSON strings may hold characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{place} is not a line with prompt or messages") from error
        try:
            json.dumps(row, ensure_ascii=False).encode()  # as it will be written
            messages = system + messages if isinstance(messages, list) else messages
            render_text(messages)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        lines.append(_Line(place, row, messages))
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lines


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_file():
        what = "a folder" if output.is_dir() else "no plain file"
        raise ValueError(f"--output={output} is {what}; name a .jsonl file")
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: {output.parent} is not a folder; make it first")


def _ids(cfg: Any, tok: Any, line: _Line) -> list[int]:
    """The token ids of a line's conversation, which the model has positions for."""
    from zephyr_jax.generation import check_ids, prompt_ids

    try:
        ids = prompt_ids(tok, line.messages)
    except ValueError as error:
        raise ValueError(f"{line.place}: {error}") from error
    check_ids(cfg, ids, line.place)
    return ids


def _batch(
    reply: Any,
    lines: list[_Line],
    prompts: list[list[int]],
    output: Path,
    size: int,
    speed: Any,
) -> None:
    temporary = output.with_name(f".{output.name}.{os.getpid()}.new")
    try:
        with (
            temporary.open("w", encoding="utf-8") as file,
            tqdm(total=len(lines), unit="prompt") as bar,
        ):
            for at in range(0, len(lines), size):
                portion = lines[at : at + size]
                replies = reply(prompts[at : at + size], first_row=at, speed=speed)
                for line, text in zip(portion, replies, strict=True):
                    row = line.row | {"reply": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.set_postfix_str(f"{speed.decode_rate:.0f} tok/s", refresh=False)
                bar.update(len(portion))
        os.replace(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    logging.info("%d replies in %s", len(lines), output)


def _chat(reply: Any, messages: list[dict[str, str]], limit: int, is_full: Any) -> None:
    """Talks until an empty line, the end of input, Ctrl-C, or the model's last position."""

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        while said := input("you: ").strip():
            messages = [*messages, {"role": "user", "content": said}]
            if is_full(messages):
                show(f"the conversation is full at {limit} tokens; start again\n")
                return
            show("model: ")
            answer = reply([messages], on_text=show)[0]
            show("\n")
            messages = [*messages, {"role": "assistant", "content": answer}]
    except (EOFError, KeyboardInterrupt):
        show("\n")
