"""Runs the blocks of one Markdown page in the folder where it is started: `docs_runner.py PAGE`.

Python blocks share one namespace, in order; a shell block marked `<!-- run -->` runs between them.
`<!-- setup: NAME -->` above a block, which then runs too, first runs a function of this file, whose
result is the value of names that the block uses. What a reader has before the page begins, and no
more, is made there.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from docs_pages import ROOT, blocks


def folder() -> dict[str, Any]:
    """A checkout to work in: `scripts`, `configs`."""
    for name in ("scripts", "configs"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    return {}


def world() -> dict[str, Any]:
    """Both prepared sets of a little world, and its tokenizer, where configs/demo_* look."""
    from raw_rows import write_world

    folder()
    write_world(Path(), 768)
    return {}


def demo() -> dict[str, Any]:
    """What `make demo` leaves, untrained: `demo_run/hf`, `demo_run/data`."""
    import jax

    import zephyr_jax as zj

    world()
    for name in ("data", "raw"):
        Path("demo_run").mkdir(exist_ok=True)
        Path("demo_run", name).symlink_to(Path(name).absolute())
    cfg = zj.load_config("demo_sft").model
    tok = zj.Tokenizer.from_folder("tokenizer")
    zj.export_hf(cfg, zj.init_params(cfg, jax.random.key(0)), tok, "demo_run/hf", dtype="float32")
    return {}


def sft_run() -> dict[str, Any]:
    """Three steps of `configs/demo_sft.py` in `runs/demo_sft`."""
    import zephyr_jax as zj

    world()
    zj.fit(zj.load_config("demo_sft", ["--config.train.max_steps=3"]))
    return {}


def tiny_arrays() -> dict[str, Any]:
    """Tokens of a tiny model and log-probs of pairs, next to what `world` makes."""
    import jax
    import jax.numpy as jnp

    world()
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 3, 104)
    pairs = [jnp.array([-12.0, -9.5]) - shift for shift in (0.0, 1.5, 0.25, 0.75)]
    logps = dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), pairs, strict=True))
    return {"tokens": tokens, "loss_mask": jnp.ones((2, 12), bool).at[:, :4].set(False), **logps}


def dpo_config() -> dict[str, Any]:
    """`config`, as a config file has it before a section is added."""
    import runpy

    from ml_collections import ConfigDict

    folder()
    config = runpy.run_path(str(ROOT / "configs" / "demo_dpo.py"))["get_config"]()
    return {"config": config, "ConfigDict": ConfigDict}


def loaded() -> dict[str, Any]:
    """`cfg, params, tok` of a small model."""
    import jax

    import zephyr_jax as zj

    world()
    tok = zj.Tokenizer.from_folder("tokenizer")
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=tok.vocab_size)
    return {"cfg": cfg, "params": zj.init_params(cfg, jax.random.key(0)), "tok": tok}


SETUPS = (folder, world, demo, sft_run, tiny_arrays, dpo_config, loaded)


def main(page: Path) -> None:
    """Runs the page; a block that fails ends with its traceback, which names file and line."""
    folder()
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.mark == "not run":
            continue
        start = time.monotonic()
        if block.mark == "setup":
            names |= {each.__name__: each for each in SETUPS}[block.argument]()
        if block.language == "python":
            code = "\n" * block.line + block.text  # so that a traceback has the page's lines
            exec(compile(code, str(page), "exec"), names)
        elif block.language == "bash" and block.mark in ("run", "setup"):
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        else:
            continue
        sys.stderr.write(f"{block.place} {time.monotonic() - start:.1f} s\n")


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(Path(sys.argv[1]).resolve())
