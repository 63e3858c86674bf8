"""An HTTP server with OpenAI's interface: one model, one host, one request at a time.

GET /v1/models and /health, POST /v1/chat/completions and /v1/completions (docs/serving.md). The
sampling flags are the defaults of requests that do not name these settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import socket
from pathlib import Path
from typing import Any

from absl import logging

from zephyr_jax.cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    flags.add_model(parser)
    flags.add_name(parser, "model name for clients (default: last part of --model)")
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    add("--port", type=int, default=8000, help="port to listen on (0: any free one)")
    add("--token", default="", help="API key that clients must send (better: ZEPHYR_JAX_TOKEN)")
    add("--cors", action="append", default=[], help="allowed CORS origin (repeatable)")
    queue = "queue length; requests beyond it get HTTP 429"
    add("--max_waiting", type=flags.at_least(0), default=32, help=queue)
    flags.add_sampling(parser, max_new_tokens=512)
    flags.add_mesh(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM."""
    token = (args.token or os.environ.get("ZEPHYR_JAX_TOKEN", "")).strip()  # files end in a newline
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token must be of printable ASCII characters; no header holds others")
    local = args.host in ("localhost", "127.0.0.1", "::1")
    if not local and not token:
        raise ValueError(
            f"--host={args.host} can be reached from other machines; set ZEPHYR_JAX_TOKEN or "
            "--token, or take --host=127.0.0.1"
        )
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port={args.port} must be from 0 (any) to 65535")
    try:
        import uvicorn

        from zephyr_jax.inference.replies import ServedModel
        from zephyr_jax.inference.server import Connection, Engine, make_app
    except ModuleNotFoundError as error:
        message = f'serve needs {error.name}; pip install "zephyr_jax[serve]"'
        raise ModuleNotFoundError(message) from error
    from zephyr_jax.inference.decoding import cast_params
    from zephyr_jax.inference.sampling import SamplingParams
    from zephyr_jax.weights.sources import load_in

    sampling = SamplingParams(**flags.sampling_settings(args))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    mesh = functools.partial(flags.all_devices, args.tensor, args.fsdp)
    try:
        # Before the model is loaded, since the port may be taken; early clients wait.
        with socket.create_server((args.host, args.port), family=family) as listener, mesh():
            cfg, params, tok, _ = load_in(args.model, args.dtype)
            sampling = dataclasses.replace(sampling, stop_ids=(tok.eos_id, *cfg.end_ids))
            name = args.name or Path(args.model).name or args.model
            served = ServedModel(cfg, cast_params(cfg, params), tok, name, sampling)
            # A mesh belongs to one thread, so the device's thread enters it again.
            engine = Engine(served, args.max_waiting, lambda: mesh().__enter__())
            engine.warm_up()
            app = make_app(engine, token, args.cors, local)
            options: Any = {"log_config": None, "log_level": "warning", "access_log": False}
            options |= {"lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 5}
            options["http"] = Connection
            host = f"[{args.host}]" if ":" in args.host else args.host
            logging.info("http://%s:%d/v1 is ready", host, listener.getsockname()[1])
            uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again when it has ended
        logging.info("stopped")
