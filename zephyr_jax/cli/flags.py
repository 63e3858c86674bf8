"""Flags that several commands share, each declared once, and types of flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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


def output_file(text: str) -> Path:
    """The type of a flag that names a file to write, in a folder that is there."""
    path = Path(text).expanduser()
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is not a file in an existing folder")
        path.exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def add_config(parser: Any, help: str) -> None:
    """Declares --config, which is required."""
    parser.add_argument("--config", required=True, help=help)


def add_data_dir(parser: Any, **options: Any) -> None:
    """Declares --data_dir."""
    parser.add_argument("--data_dir", **options)


def add_split(parser: Any, **options: Any) -> None:
    """Declares --split."""
    parser.add_argument("--split", **options)


def add_rows(parser: Any, **options: Any) -> None:
    """Declares --rows."""
    parser.add_argument("--rows", **options)


def add_overwrite(parser: Any, help: str) -> None:
    """Declares --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help=help)


def add_limit(parser: Any, help: str) -> None:
    """Declares --limit."""
    parser.add_argument("--limit", type=at_least(1), metavar="N", help=help)


def add_samples(parser: Any, help: str, default: int | None = None) -> None:
    """Declares --samples, a number of prompts that a report shows replies to."""
    parser.add_argument("--samples", type=at_least(0), default=default, metavar="N", help=help)


def add_workdir(parser: Any, help: str, default: str | None = None) -> None:
    """Declares --workdir."""
    parser.add_argument("--workdir", default=default, help=help)


def add_output(parser: Any, help: str, metavar: str = "FILE.json") -> None:
    """Declares --output, a file to write."""
    parser.add_argument("--output", type=output_file, metavar=metavar, help=help)


def add_seed(parser: Any) -> None:
    """Declares --seed."""
    parser.add_argument("--seed", type=int, default=0, help="random seed")


def add_system(parser: Any) -> None:
    """Declares --system."""
    parser.add_argument("--system", default="", help="system message before the conversation")


def add_name(parser: Any, help: str) -> None:
    """Declares --name, what others call the model."""
    parser.add_argument("--name", help=help)


def add_dtype(parser: Any, help: str, choices: tuple[str, ...] = ("float32", "bfloat16")) -> None:
    """Declares --dtype."""
    parser.add_argument("--dtype", choices=choices, help=help)


def add_model(parser: Any, *, required: bool = True) -> None:
    """Declares --model and --dtype."""
    sources = "Hugging Face folder or hub id, GGUF file, checkpoint or workdir"
    parser.add_argument("--model", required=required, help=sources)
    add_dtype(parser, "compute dtype (default: the model's own)")


def load(args: argparse.Namespace) -> Any:
    """The model of --model, which computes in --dtype."""
    from zephyr_jax.weights.sources import load_model

    model = load_model(args.model, dtype=args.dtype)
    if args.dtype:
        model = model._replace(cfg=dataclasses.replace(model.cfg, dtype=args.dtype))
    return model


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Declares the flags that `sampling_settings` reads."""
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
    """Declares --tensor and --fsdp."""
    parser.add_argument("--tensor", type=int, default=1, help="devices to shard the heads over")
    parser.add_argument("--fsdp", type=int, default=1, help="devices to shard the weights over")


def all_devices(tensor: int, fsdp: int) -> Any:
    """A context with the mesh of all devices; an empty context if there is only one device."""
    import jax

    from zephyr_jax.sharding import make_mesh

    n = jax.device_count()
    if min(tensor, fsdp) < 1 or n % (tensor * fsdp):
        raise ValueError(
            f"--tensor={tensor} times --fsdp={fsdp} must divide the {n} devices; the rest of "
            "them replicate the weights and share the rows"
        )
    return jax.set_mesh(make_mesh(-1, fsdp, tensor)) if n > 1 else contextlib.nullcontext()
