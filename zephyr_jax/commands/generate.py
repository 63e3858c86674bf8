"""Replies of a model: to one prompt, to a file of prompts, or in a chat.

A line of --prompts is {"prompt": "..."} or {"messages": [...]}; the output repeats it with "reply".
What a line gets depends on the line, its number and the seed, not on --batch_size. With several
devices every one has all weights and a part of the rows, unless --tensor or --fsdp divide them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm


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
    parser.add_argument("--tensor", type=int, default=1, help="devices that share a layer's heads")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that divide the weights")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.prompts and not args.output:
        raise ValueError("--prompts needs --output=FILE.jsonl")
    if args.output and not args.prompts:
        raise ValueError("--output belongs to --prompts=FILE.jsonl")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1")
    lines = _read_prompts(Path(args.prompts)) if args.prompts else []
    with _devices(args.tensor, args.fsdp):
        _run(args, lines)


def _devices(tensor: int, fsdp: int) -> Any:
    """The mesh of all devices; none where there is but one."""
    import jax

    from zephyr_jax.sharding import make_mesh

    n = jax.device_count()
    if min(tensor, fsdp) < 1 or n % (tensor * fsdp):
        raise ValueError(
            f"--tensor={tensor} times --fsdp={fsdp} must divide the {n} devices here; the rest "
            "of them goes to data"
        )
    return jax.set_mesh(make_mesh(-1, fsdp, tensor)) if n > 1 else contextlib.nullcontext()


def _run(args: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    import dataclasses

    from zephyr_jax.checkpoint import load_model
    from zephyr_jax.generation import generate
    from zephyr_jax.models.decoding import Speed

    model = load_model(args.model, dtype=args.dtype)
    cfg, tok = model.cfg, model.tokenizer
    if args.dtype:
        cfg = dataclasses.replace(cfg, dtype=args.dtype)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed")
    settings = {name: getattr(args, name) for name in names}
    system = [{"role": "system", "content": args.system}] if args.system else []
    speed = Speed()

    def reply(prompts: list[Any], **more: Any) -> list[str]:
        return generate(cfg, model.params, tok, prompts, **settings, **more)

    if args.chat:
        _chat(reply, system)
        return
    if args.prompts:
        _batch(reply, lines, system, Path(args.output), args.batch_size, speed)
    else:
        messages = [*system, {"role": "user", "content": args.prompt}]
        sys.stdout.write(reply([messages], speed=speed)[0] + "\n")
    logging.info("%s", speed)


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    lines = []
    # Not splitlines: JSON strings may hold characters that it takes for line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").strip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a line with prompt or messages") from error
        lines.append(row | {"_messages": messages})
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def _batch(
    reply: Any, lines: list[dict[str, Any]], system: list, output: Path, size: int, speed: Any
) -> None:
    temporary = output.with_name(output.name + ".tmp")
    with (
        temporary.open("w", encoding="utf-8") as file,
        tqdm(total=len(lines), unit="prompt") as bar,
    ):
        for at in range(0, len(lines), size):
            portion = lines[at : at + size]
            messages = [system + row["_messages"] for row in portion]
            replies = reply(messages, first_row=at, speed=speed)
            for row, text in zip(portion, replies, strict=True):
                row = {k: v for k, v in row.items() if k != "_messages"}
                file.write(json.dumps(row | {"reply": text}, ensure_ascii=False) + "\n")
            bar.set_postfix_str(f"{speed.decode_rate:.0f} tok/s", refresh=False)
            bar.update(len(portion))
    os.replace(temporary, output)
    logging.info("%d replies in %s", len(lines), output)


def _chat(reply: Any, messages: list[dict[str, str]]) -> None:
    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        messages = [*messages, {"role": "user", "content": said}]
        show("model: ")
        answer = reply([messages], on_text=show)[0]
        show("\n")
        messages = [*messages, {"role": "assistant", "content": answer}]
