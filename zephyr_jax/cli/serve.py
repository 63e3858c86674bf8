"""An HTTP server with OpenAI's interface: one model, one host, one request at a time.

GET /v1/models and /health, POST /v1/chat/completions and /v1/completions (docs/serving.md). How
replies are drawn is what a request says, and where it says nothing the flags here.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import ipaddress
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from zephyr_jax.cli import flags as mesh_flags
from zephyr_jax.cli import sampling_flags

if TYPE_CHECKING:
    from zephyr_jax.inference.server.engine import Engine
    from zephyr_jax.inference.server.requests import Served

SECONDS_TO_END = 5  # for replies that are being made when the server is stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder or hub id, GGUF, checkpoint or workdir"
    )
    parser.add_argument("--name", help="of the model, for clients; default: the end of --model")
    parser.add_argument("--host", default="127.0.0.1", help="not loopback: --token is needed")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--token", default="", help="that clients must send; better in ZEPHYR_JAX_TOKEN"
    )
    parser.add_argument(
        "--cors", action="append", default=[], help="an origin whose pages may ask; again"
    )
    parser.add_argument("--max_waiting", type=int, default=32, help="requests; further ones: 429")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of a chat's reply")
    sampling_flags.add_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    parser.add_argument(
        "--warm_up", type=int, default=256, help="compile for prompts up to this long; 0: later"
    )
    mesh_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command until SIGINT or SIGTERM."""
    token = args.token or os.environ.get("ZEPHYR_JAX_TOKEN", "")
    _check(args, token)
    try:
        from zephyr_jax.inference.server.engine import Engine

        uvicorn = importlib.import_module("uvicorn")
        from zephyr_jax.inference.server.http import make_app
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serve needs the package {error.name}; install it with: pip install starlette uvicorn"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        with socket.socket(family) as listener, mesh_flags.all_devices(args.tensor, args.fsdp):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((args.host, args.port))  # before the model is loaded: it may be taken
            engine = Engine(_load(args), args.max_waiting)
            _warm_up(engine.served, args.warm_up)
            config = uvicorn.Config(
                make_app(engine, token, args.cors),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
            listener.listen(128)  # from here on nobody is turned away
            place = f"[{args.host}]" if ":" in args.host else args.host
            logging.info("http://%s:%d/v1 is ready", place, listener.getsockname()[1])
            _serve(uvicorn.Server(config), listener, engine, args)
    except KeyboardInterrupt:  # which uvicorn raises once more when it has ended
        logging.info("stopped")


def _serve(server: Any, listener: socket.socket, engine: Engine, args: Any) -> None:
    def answer() -> None:
        with mesh_flags.all_devices(args.tensor, args.fsdp):  # a mesh belongs to one thread
            engine.run()

    thread = threading.Thread(target=answer, name="device", daemon=True)
    thread.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()
        thread.join(SECONDS_TO_END)


def _check(args: argparse.Namespace, token: str) -> None:
    try:
        loopback = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not token:
        raise ValueError(
            f"--host={args.host} can be reached from elsewhere; set ZEPHYR_JAX_TOKEN or --token, "
            "or take --host=127.0.0.1"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token must be printable ASCII without blanks; choose another")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port={args.port} must be from 0 (any) to 65535")
    for name, least in (("max_waiting", 0), ("max_new_tokens", 1), ("warm_up", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")


def _load(args: argparse.Namespace) -> Served:
    import dataclasses

    from zephyr_jax.inference.decoding import cast_params
    from zephyr_jax.inference.generate import prompt_ids
    from zephyr_jax.inference.sampling import SamplingParams
    from zephyr_jax.inference.server.requests import Served, adds_bos
    from zephyr_jax.weights.checkpoint import load_model

    model = load_model(args.model, dtype=args.dtype)
    cfg, tok = model.cfg, model.tokenizer
    cfg = dataclasses.replace(cfg, dtype=args.dtype) if args.dtype else cfg
    sampling = SamplingParams(**sampling_flags.of(args))
    try:
        prompt_ids(tok, "a")
    except ValueError as error:
        logging.warning("/v1/chat/completions will refuse: %s", error)
    name = args.name or Path(args.model).name or args.model
    weights, bos = cast_params(cfg, model.params), adds_bos(tok)
    return Served(cfg, weights, tok, name, bos, args.max_new_tokens, sampling)


def _warm_up(served: Served, longest: int) -> None:
    """Compiles what requests of default settings need, for prompts of up to `longest` tokens."""
    from zephyr_jax.inference.decoding import rounded
    from zephyr_jax.inference.server.engine import replies
    from zephyr_jax.inference.server.requests import Asked

    longest = min(longest, served.cfg.max_position_embeddings)
    sizes: Sequence[int] = sorted({rounded(n, 64) for n in range(1, longest + 1)})
    for i, size in enumerate(sizes, 1):
        start = time.monotonic()
        n = min(size, longest)
        ends = tuple(-1 - k for k in range(len(served.ends)))  # nothing ends it before both run
        asked = Asked(True, [[served.tok.eos_id] * n], n, served.max_new_tokens, *served[6:], ends)
        collections.deque(itertools.islice(replies(served, asked), 2), maxlen=0)
        took = time.monotonic() - start
        logging.info(
            "compiled for prompts of up to %d tokens: %.1f s, %d of %d", *(n, took, i), len(sizes)
        )
