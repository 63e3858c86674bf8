"""The command line: `python -m zephyr_jax COMMAND`, and `zephyr-jax COMMAND` where installed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import NoReturn

from zephyr_jax.reports.fit import progress

# command -> (module with add_arguments and run, help)
COMMANDS = {
    "prepare_data": ("zephyr_jax.cli.prepare_data", "convert raw records to a TFDS set"),
    "inspect_data": ("zephyr_jax.cli.inspect_data", "show raw rows, prepared sets and packed rows"),
    "train": ("zephyr_jax.cli.train", "train: SFT or DPO, by the config"),
    "replay_batch": ("zephyr_jax.evaluation.bad_steps", "look for what made a step of a run bad"),
    "port_weights": ("zephyr_jax.cli.port_weights", "import and export weights"),
    "generate": ("zephyr_jax.cli.generate", "reply to one prompt or a file of prompts, or chat"),
    "serve": ("zephyr_jax.cli.serve", "serve a model over HTTP with OpenAI's interface"),
    "plan": ("zephyr_jax.cli.plan", "compile a run for TPU slices without having them"),
    "report": ("zephyr_jax.reports.fit", "write the report of a run, finished or not"),
    "collect_feedback": ("zephyr_jax.cli.collect_feedback", "answers and ratings, for new pairs"),
    "evaluate": ("zephyr_jax.cli.evaluate", "measure a model on prepared sets and benchmarks"),
    "doctor": ("zephyr_jax.cli.doctor", "check whether runs will work on this machine"),
    "demo": ("zephyr_jax.demo.run", "run the whole pipeline on the embedded world"),
}

INTERRUPTED = 130  # exit status after SIGINT, as of shells
# Errors that input, files and disk can cause; any other is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, MemoryError, BrokenExecutor)
_ADVICE = {  # what JAX's errors that a machine causes say -> the way out
    "RESOURCE_EXHAUSTED": "more train.micro_batches, train.remat=full, fewer rows at once or more "
    "devices need less",
    "Unable to initialize backend": "unset JAX_PLATFORMS, or install JAX for that device",
}


class _Interrupt:
    """Makes the first SIGINT a KeyboardInterrupt; a second one ends the process at once."""

    again = False  # set by whoever catches the first one

    def __call__(self, *_: object) -> None:
        if self.again:
            os.write(2, b"\nerror: stopped by the keyboard at once\n")
            os._exit(INTERRUPTED)
        self.again = True
        raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def parse_mixed(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        nested = self._subparsers is not None  # else words may stand between flags
        return self.parse_known_args(words) if nested else self.parse_known_intermixed_args(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; bad input ends in one line on stderr and exit status 2."""
    began = time.monotonic()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        lines = [f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()]
        usage = "\n".join(["usage: python -m zephyr_jax COMMAND [--help] ...", *lines])
        if words and words[0] in ("-h", "--help"):
            sys.stdout.write(f"{usage}\n")
            return
        unknown = f"error: no command {words[0]!r}\n" if words else ""
        sys.stderr.write(f"{unknown}{usage}\n")
        raise SystemExit(2)
    halves = (word.partition("=") for word in words)  # where shells leave a ~ as it is
    prompts = ("--prompt", "--system", "--stop")
    name, *rest = (a + eq + (b if a in prompts else os.path.expanduser(b)) for a, eq, b in halves)
    module = importlib.import_module(COMMANDS[name][0])
    # allow_abbrev would take --config.a.b for a shortened flag of its own
    parser = _Parser(
        f"zephyr_jax {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    # One with a blank in it, argparse would take for a positional argument.
    assigned = [word for word in rest if word.startswith("--config.")]
    known, others = parser.parse_mixed([word for word in rest if word not in assigned])
    overrides = [*assigned, *others]
    unknown = [word for word in overrides if not word.startswith("--config.")]
    if not hasattr(known, "config"):
        unknown = overrides
    if unknown:
        fields = [word[2:] for word in unknown if hasattr(known, "config") and "." in word]
        meant = "".join(f"; did you mean --config.{field}?" for field in fields[:1])
        incomplete = [word for word in overrides if word not in unknown and "=" not in word]
        meant += "".join(f"; write {word}=VALUE, with =" for word in incomplete[:1])
        parser.error(f"unknown arguments: {' '.join(unknown)}{meant}")
    known.overrides, known.began = overrides, began
    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, _Interrupt())
    try:
        with progress():
            module.run(known)
    except _USER_ERRORS as error:
        notes = getattr(error, "__notes__", ()) if isinstance(error, FileNotFoundError) else ()
        sys.stderr.write("\n".join([f"error: {' '.join(str(error).split())}", *notes, ""]))
        raise SystemExit(2) from error
    except (RuntimeError, AssertionError) as error:  # JAX's, whose import would take a second
        no_cuda = not str(error) and os.environ.get("JAX_PLATFORMS") == "cuda"  # not installed
        text = "Unable to initialize backend 'cuda'" if no_cuda else str(error)
        advice = next((_ADVICE[words] for words in _ADVICE if words in text), None)
        if advice is None:
            raise
        sys.stderr.write(f"error: {text.splitlines()[0]:.200}: {advice}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write("\nerror: stopped by the keyboard\n")
        raise SystemExit(INTERRUPTED) from None
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
