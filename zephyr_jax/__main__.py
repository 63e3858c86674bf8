"""The command line: `python -m zephyr_jax COMMAND`, and `zephyr-jax COMMAND` where installed."""

from __future__ import annotations

import argparse
import importlib
import logging as standard_logging
import os
import sys
from collections.abc import Sequence

from absl import logging

# command -> (module with add_arguments and run, what it does)
COMMANDS = {
    "prepare_data": ("zephyr_jax.cli.prepare_data", "raw records -> TFDS set"),
    "inspect_data": ("zephyr_jax.cli.inspect_data", "raw rows, sets and packed rows to see"),
    "train": ("zephyr_jax.cli.train", "SFT or DPO, as the config says"),
    "port_weights": ("zephyr_jax.cli.port_weights", "weights in and out"),
    "generate": ("zephyr_jax.cli.generate", "replies: one, a file of them, or a chat"),
    "serve": ("zephyr_jax.cli.serve", "a model over HTTP, with OpenAI's interface"),
    "plan": ("zephyr_jax.cli.plan", "a run on TPU slices that are not here"),
    "report": ("zephyr_jax.cli.report", "the report of a run, finished or not"),
    "evaluate": ("zephyr_jax.cli.evaluate", "perplexity; how often the chosen answer wins"),
    "doctor": ("zephyr_jax.cli.doctor", "will runs work here, and what will be slow"),
    "demo": ("zephyr_jax.demo.run", "the whole road on the embedded default"),
}

# What a user's input, files and disk can cause; anything else is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; bad input ends in one line on stderr and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        wanted = words and words[0] in ("-h", "--help")
        lines = [f"  {name:<13} {said}" for name, (_, said) in COMMANDS.items()]
        usage = "usage: python -m zephyr_jax COMMAND [--help] ...\n" + "\n".join(lines)
        unknown = "" if wanted or not words else f"error: no command {words[0]!r}\n"
        (sys.stdout if wanted else sys.stderr).write(f"{unknown}{usage}\n")
        raise SystemExit(0 if wanted else 2)
    name, rest = words[0], words[1:]
    module = importlib.import_module(COMMANDS[name][0])
    # allow_abbrev would take --config.a.b for a shortened flag of its own
    parser = argparse.ArgumentParser(
        f"zephyr_jax {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    known, overrides = parser.parse_known_args(rest)
    unknown = [word for word in overrides if not word.startswith("--config.")]
    if unknown or (overrides and not hasattr(known, "config")):
        parser.error(f"unknown arguments: {' '.join(unknown or overrides)}")
    known.overrides = overrides
    _log_our_own()
    try:
        module.run(known)
    except _USER_ERRORS as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from error


def _log_our_own() -> None:
    """Progress of this package on stderr, and of others only what went wrong."""
    logging.set_verbosity(logging.INFO)
    handler = standard_logging.StreamHandler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = os.path.dirname(__file__)
    handler.addFilter(
        lambda record: record.pathname.startswith(ours) or record.levelno >= standard_logging.ERROR
    )
    logger = logging.get_absl_logger()
    logger.propagate = False
    logger.handlers[:] = [handler]


if __name__ == "__main__":
    main()
