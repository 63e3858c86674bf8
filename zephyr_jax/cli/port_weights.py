"""Ports weights between Hugging Face folders, GGUF files and this project's checkpoints.

verify DIR: compares a workdir, an import (and its source) or an export with its digests.
import SRC DST: a Hugging Face folder, GGUF file or hub id becomes a checkpoint folder; so does a
PEFT adapter, merged into --base=MODEL.
export SRC DST: a checkpoint, workdir, Hugging Face folder or GGUF file becomes a Hugging Face
folder or, with --format=gguf, a file for llama.cpp and LM Studio. For a run with adapters these
formats hold the merged model, and --format=peft the adapter alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from zephyr_jax.cli import flags
from zephyr_jax.hub import check_login, push
from zephyr_jax.reports.run import model_card_fields
from zephyr_jax.weights import sources
from zephyr_jax.weights.checkpoint import Model, check_vacant, save_model, saved_steps
from zephyr_jax.weights.exports import check_replaceable
from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.huggingface import export_hf, hf_layout, read_config
from zephyr_jax.weights.layouts import check_tensors
from zephyr_jax.weights.peft import export_peft, load_peft, usable_base

_AUTO = (None, "auto")  # of --dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("direction", choices=("import", "export", "verify"))
    held = "workdir, checkpoint, Hugging Face or PEFT folder, .gguf file or ORG/NAME[@REVISION]"
    add("source", help=held)
    step = "export the checkpoint of this step of a run, or its best one (default: the newest)"
    add("--step", metavar="N|best", help=step)
    add("destination", nargs="?", help="a new folder; with --format=gguf a folder or a .gguf file")
    add("--format", choices=("hf", "gguf", "peft"), help="export format (hf)")
    base = "import: model to merge a PEFT adapter into; peft export: name of the base in its config"
    add("--base", metavar="MODEL", help=base)
    dtype = "dtype of exported matrices (auto: what the source holds, or a run computed in)"
    dtypes = ("auto", "float32", "bfloat16", "float16", "q8_0")
    flags.add_dtype(parser, dtype, choices=dtypes)
    flags.add_overwrite(parser, "replace an earlier export")
    add("--push", metavar="ORG/NAME", help="also upload the export to the hub")
    add("--public", action="store_true", help="make the repository that --push creates public")


def run(args: argparse.Namespace) -> None:
    if args.direction == "verify":
        sources.verify_model(args.source)
        logging.info("%s is as it was written", args.source)
        return
    _check_flags(args)
    if args.push:
        check_login(args.push)  # before any work is done
    if args.direction == "import":
        _import(args)
        return
    if args.step:
        steps = [str(step) for step in saved_steps(epath.Path(args.source))]
        if args.step not in ("best", *steps):
            held = ", ".join(steps) or "none"
            raise ValueError(f"--step={args.step} is no step of {args.source}, which has {held}")
        args.source = f"{args.source.rstrip('/')}/checkpoints/{args.step}"
    path = _export_peft(args) if args.format == "peft" else _export_model(args)
    logging.info("%s is in %s", args.source, path)
    if args.push:
        logging.info("%s is at %s", path, push(path, args.push, private=not args.public))


def _check_flags(args: argparse.Namespace) -> None:
    unused = []
    if not args.destination:
        raise ValueError(f"{args.direction} needs a destination: {args.direction} SRC DST")
    if args.direction == "import":  # a checkpoint holds what the source does, in float32
        names = ("dtype", "format", "push", "step", "overwrite")
        unused = [name for name in names if getattr(args, name) not in (*_AUTO, False)]
    elif args.base and args.format != "peft":
        unused = ["base"]
    if args.public and not args.push:
        unused.append("public")
    for name in unused:
        raise ValueError(f"--{name} has no effect on this {args.direction}; leave it out")
    if args.dtype == "q8_0" and args.format != "gguf":
        raise ValueError("--dtype=q8_0 belongs to an export with --format=gguf")


def _import(args: argparse.Namespace) -> None:
    check_vacant(Path(args.destination))
    if args.base and not Path(args.source).is_dir():
        advice = f"download it first (hf download {args.source} --local-dir FOLDER)"
        raise FileNotFoundError(f"{args.source} is no folder with a PEFT adapter; {advice}")
    model = sources.load_model(args.base or args.source)
    if args.base:
        peft = load_peft(args.source, model.cfg)
        if peft.base_digest:
            sources.check_base(model.params, peft.base_digest, args.base, args.source)
        else:
            logging.warning("%s has no digest of its base, to compare with", args.source)
        params = sources.merge_into(model.params, peft.adapters, peft.lora, "float32")
        lines = [*model.lineage["lineage"], f"merged with the PEFT adapter {args.source}"]
        model = Model(model.cfg, params, model.tokenizer, {"lineage": lines})
    sources.check_all_finite(model.params, args.source)
    model.lineage["source"] = sources.source_files(args.base or args.source)
    save_model(model, args.destination)
    logging.info("%s is in %s", args.source, args.destination)


def _export_model(args: argparse.Namespace) -> Path:
    gguf = args.format == "gguf"
    if not gguf or args.destination.endswith(".gguf"):
        check_replaceable(Path(args.destination), args.overwrite)
    held = sources.stored_dtype(sources.resolve(args.source))
    dtype = held if args.dtype in _AUTO else args.dtype
    if dtype == "q8_0" and not gguf:
        dtype = "float16"
    # Read in the dtype of the files, so that there is no other copy; norms are float32 in a GGUF.
    model = sources.load_model(args.source, dtype="float32" if gguf else dtype)
    dtype = dtype or model.cfg.dtype
    holds = f"holds {held}" if held else f"computed in {model.cfg.dtype}, from float32 parameters"
    logging.info("%s %s; its matrices are written in %s", args.source, holds, dtype)
    if model.tokenizer.chat_format is None:
        logging.info("the export has Zephyr's chat template")
    options: dict[str, Any] = {"dtype": dtype, "overwrite": args.overwrite}
    options["card"] = model_card_fields(args.source, model.lineage)
    return (export_gguf if gguf else export_hf)(*model[:3], args.destination, **options)


def _export_peft(args: argparse.Namespace) -> Path:
    target = Path(args.destination)
    dtype = "float32" if args.dtype in _AUTO else args.dtype  # adapters are small
    check_replaceable(target, args.overwrite)
    cfg, lora, adapters, meta = sources.load_adapters(args.source)
    names = [args.base or sources.find_base(args.source, meta["base"]["source"])]
    if not args.base and len(meta["lineage"]) == 2:  # the base is as it was ported
        names.append(meta["lineage"][0].removeprefix("ported from "))
    name = usable_base(*names)
    if Path(name).is_absolute():
        theirs = hf_layout(read_config(Path(name))).shapes
        check_tensors(hf_layout(cfg).shapes, theirs, f"{args.source} and the base {name}")
        if args.push:
            logging.warning("others have no %s; name the base's hub id as --base", name)
    options: dict[str, Any] = {"dtype": dtype, "overwrite": args.overwrite}
    options |= {"tok": sources.find_tokenizer(args.source), "base_digest": meta["base"]["digest"]}
    options["card"] = model_card_fields(args.source, meta)
    return export_peft(target, cfg, lora, adapters, name, **options)
