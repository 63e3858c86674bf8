"""Flags that several commands share, each declared once, and types of flags."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number from `smallest` on."""

    def whole_number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} must be at least {smallest}")
        return int(text)

    return whole_number


def not_empty(text: str) -> str:
    """The type of a flag that an unset variable of the shell would leave without its value."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return text


def output_file(text: str) -> Path:
    """The type of a flag that names a file to write, in a folder that is there."""
    path = Path(text).expanduser()
    try:
        if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is not a file in an existing folder")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def adder(flag: str, **defaults: Any) -> Callable[..., None]:
    """What declares a flag in the parser of a command, with its help and options of its own."""

    def add(parser: Any, help: str | None = None, **options: Any) -> None:
        parser.add_argument(flag, **{"help": help, **defaults, **options})

    return add


add_config = adder("--config", required=True)
add_data_dir = adder("--data_dir", type=not_empty)
add_split = adder("--split")
add_rows = adder("--rows")
add_overwrite = adder("--overwrite", action="store_true")
add_limit = adder("--limit", type=at_least(1), metavar="N")
add_workdir = adder("--workdir", type=not_empty)
add_output = adder("--output", type=output_file, metavar="FILE.json")
add_seed = adder("--seed", type=int, default=0, help="random seed")
add_system = adder("--system", default="", help="system message before the conversation")
add_name = adder("--name")  # what others call the model
add_dtype = adder("--dtype", choices=("float32", "bfloat16"))


def add_model(parser: Any, *, required: bool = True) -> None:
    sources = "Hugging Face folder or hub id, GGUF file, checkpoint or workdir"
    parser.add_argument("--model", required=required, help=sources)
    add_dtype(parser, "compute dtype (default: the model's own)")


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=max_new_tokens, help="longest reply, in tokens")
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top_k", type=int, default=50, help="0: all tokens")
    add("--top_p", type=float, default=0.95, help="1: all tokens")
    add("--min_p", type=float, default=0.0, help="0: all tokens")


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the sampling flags, by the names of SamplingParams."""
    return {name: getattr(args, name) for name in _SAMPLING}


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensor", type=int, default=1, help="devices to shard the heads over")
    parser.add_argument("--fsdp", type=int, default=1, help="devices to shard the weights over")


def all_devices(tensor: int, fsdp: int) -> Any:
    """A context with the mesh of all devices; an empty context if there is only one device."""
    import jax

    from zephyr_jax.sharding import make_mesh

    n = jax.device_count()
    if min(tensor, fsdp) < 1 or n % (tensor * fsdp):
        raise ValueError(f"--tensor={tensor} times --fsdp={fsdp} must divide the {n} devices")
    return jax.set_mesh(make_mesh(-1, fsdp, tensor)) if n > 1 else contextlib.nullcontext()
