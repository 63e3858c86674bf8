"""Ports weights between Hugging Face folders, GGUF files and this project's checkpoints.

import SRC DST: a Hugging Face folder, GGUF file or hub id becomes a checkpoint folder; so does a
PEFT adapter, merged into --base=MODEL.
export SRC DST: a checkpoint, workdir, Hugging Face folder or GGUF file becomes a Hugging Face
folder or, with --format=gguf, a file for llama.cpp, LM Studio and their like. Of a run with
adapters these formats hold the whole, merged model, and --format=peft the adapter alone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from absl import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument(
        "source", help="workdir, checkpoint, Hugging Face or PEFT folder, .gguf file or hub id"
    )
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    parser.add_argument(
        "destination", help="a folder that does not exist yet; with --format=gguf a folder or .gguf"
    )
    parser.add_argument(
        "--format", choices=("hf", "gguf", "peft"), help="of an export; default: hf"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that an imported PEFT adapter is merged into; in an export with "
        "--format=peft the base's name for others, default: what the run was begun with",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="of an export's matrices; default: bfloat16 (hf), float16 (gguf), float32 (peft)",
    )
    parser.add_argument("--max_shard_gb", type=float, help="one weight file of hf; default: 5")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the export to the hub as well")
    parser.add_argument("--public", action="store_true", help="of a repository that --push makes")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    exporting = args.direction == "export"
    if args.push and not exporting:
        raise ValueError("--push uploads an export; a checkpoint has no place on the hub")
    if args.public and not args.push:
        raise ValueError("--public is about the repository of --push=ORG/NAME")
    _refuse_idle_flags(args)
    if args.dtype == "q8_0" and args.format != "gguf":
        raise ValueError("--dtype=q8_0 belongs to an export with --format=gguf")
    if args.push:
        from zephyr_jax.weights.hub import check_login

        check_login(args.push)  # before any work is done
    if not exporting:
        (_import_adapter if args.base else _import)(args)
        return
    exports = {"gguf": _export_gguf, "peft": _export_peft}
    path = exports.get(args.format, _export_hf)(args)
    if args.push:
        from zephyr_jax.weights.hub import push

        logging.info("%s is at %s", path, push(path, args.push, private=not args.public))


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError for a flag that would change nothing, and for a size that is none."""
    if args.direction == "import":
        for name in ("dtype", "format", "max_shard_gb"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} has no effect on import: a checkpoint holds what the source does, "
                    "in float32; give the flag to export"
                )
    elif args.base and args.format != "peft":
        raise ValueError(
            "--base has no effect on this export: it belongs to --format=peft, or to an import"
        )
    size = args.max_shard_gb
    if size is None:
        return
    if args.format in ("gguf", "peft"):
        raise ValueError(
            f"--max_shard_gb has no effect on --format={args.format}: it is always one file; "
            "leave it out"
        )
    if not 1e-9 <= size < math.inf:
        raise ValueError(f"--max_shard_gb={size} must be a size of at least one byte, such as 5")


def _import(args: argparse.Namespace) -> None:
    from zephyr_jax.weights.checkpoint import check_vacant, load_model, save_model

    check_vacant(Path(args.destination))
    save_model(load_model(args.source, revision=args.revision), args.destination)
    logging.info("%s is in %s", args.source, args.destination)


def _import_adapter(args: argparse.Namespace) -> None:
    from zephyr_jax.weights.checkpoint import Model, check_vacant, load_model, save_model
    from zephyr_jax.weights.merging import check_base, merge_into
    from zephyr_jax.weights.peft import load_peft

    check_vacant(Path(args.destination))
    if not Path(args.source).is_dir():
        raise FileNotFoundError(
            f"{args.source} is no folder with a PEFT adapter; download it first "
            f"(hf download {args.source} --local-dir FOLDER), or leave --base out"
        )
    cfg, params, tok, lineage = load_model(args.base, revision=args.revision)
    peft = load_peft(args.source, cfg)
    if peft.base_digest:
        check_base(params, peft.base_digest, args.base, args.source)
    else:
        said = "%s does not say by a digest what it was trained beside; its base is called %s"
        logging.warning(said, args.source, peft.base_name or "nothing")
    params = merge_into(params, peft.adapters, peft.lora, "float32")
    lines = [*lineage.get("lineage", ()), f"merged with the PEFT adapter {args.source}"]
    save_model(Model(cfg, params, tok, {"lineage": lines}), args.destination)
    logging.info("%s, merged into %s, is in %s", args.source, args.base, args.destination)


def _export_hf(args: argparse.Namespace) -> Path:
    from zephyr_jax.training.card import model_card
    from zephyr_jax.weights.checkpoint import load_model
    from zephyr_jax.weights.huggingface import export_hf
    from zephyr_jax.weights.huggingface_files import check_replaceable

    check_replaceable(Path(args.destination))
    # Read in the dtype of the files to write, so that there is no other copy of the parameters.
    dtype = args.dtype or "bfloat16"
    model = load_model(args.source, dtype=dtype, revision=args.revision)
    card = model_card(args.source, model.lineage)
    size = int((5.0 if args.max_shard_gb is None else args.max_shard_gb) * 1e9)
    path = export_hf(*model[:3], args.destination, dtype=dtype, max_shard_bytes=size, card=card)
    logging.info("%s is in %s", args.source, path)
    return path


def _export_gguf(args: argparse.Namespace) -> Path:
    from zephyr_jax.training.card import model_card
    from zephyr_jax.weights.checkpoint import load_model
    from zephyr_jax.weights.gguf import export_gguf
    from zephyr_jax.weights.gguf_io import check_replaceable, library

    library()  # before any work is done
    if args.destination.endswith(".gguf"):
        check_replaceable(Path(args.destination))
    # In float32, since norms are so in the file whatever its dtype.
    model = load_model(args.source, revision=args.revision)
    card = model_card(args.source, model.lineage)
    dtype = args.dtype or "float16"
    path = export_gguf(*model[:3], args.destination, dtype=dtype, card=card)
    logging.info("%s is in %s", args.source, path)
    return path


def _export_peft(args: argparse.Namespace) -> Path:
    from zephyr_jax.weights.checkpoint import load_adapters
    from zephyr_jax.weights.huggingface_files import check_replaceable
    from zephyr_jax.weights.peft import export_peft

    if args.revision:
        raise ValueError("--revision belongs to a hub id; --format=peft exports a run's adapters")
    check_replaceable(Path(args.destination))
    cfg, lora, adapters, meta = load_adapters(args.source)
    base = meta["base"]
    path = export_peft(
        *(args.destination, cfg, lora, adapters, args.base or base["source"]),
        base_digest=base["digest"],
        dtype=args.dtype or "float32",
        lineage=tuple(meta["lineage"]),
    )
    if not args.base and Path(base["source"], "checkpoints").is_dir():
        said = "peft cannot read the base %s: export it with --format=hf, and name that by --base"
        logging.warning(said, base["source"])
    logging.info("%s is in %s", args.source, path)
    return path
