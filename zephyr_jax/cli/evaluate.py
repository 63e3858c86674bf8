"""Scores a prepared set by a model: perplexity, and of pairs how often the chosen answer wins.

Dialogues give nats per target token and perplexity; pairs log-likelihood accuracy, and with
--reference implicit rewards, margins and the KL divergence. Every number has a 95% bootstrap
interval; docs/evaluation.md defines them. All of it goes to --output as JSON; without that it is
the last line on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging

from zephyr_jax.cli import flags as mesh_flags

if TYPE_CHECKING:
    from zephyr_jax.config.run import ChatConfig
    from zephyr_jax.evaluation.documents import Chosen, Limits, ScoreSet
    from zephyr_jax.evaluation.summary import Numbers
    from zephyr_jax.weights.checkpoint import Model

_ROWS, _SEQ_LEN, _BETA = 8, 2048, 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    add = parser.add_argument
    model = "Hugging Face folder or hub id, GGUF, checkpoint or workdir"
    add("--model", required=True, help=model)
    add("--dataset", required=True, help='such as ultrafeedback/binarized; several: "A, B"')
    add("--data_dir", default="data", help="where prepare_data put the sets (data)")
    add("--split", default="", help="default: the set's held-out split")
    add("--limit", type=int, metavar="N", help="only the first N records of each set")
    add("--reference", metavar="MODEL", help="of implicit rewards and KL; of pairs only")
    add("--beta", type=float, help=f"of implicit rewards ({_BETA})")
    add("--seq_len", type=int, default=_SEQ_LEN, help=f"tokens in a row ({_SEQ_LEN})")
    add("--rows", type=int, help=f"rows in a batch ({_ROWS}, or what the mesh divides)")
    add(
        "--max_length",
        type=int,
        help="tokens of a dialogue (seq_len), of a prompt and its longer answer (half of it); no "
        "more than the model has positions",
    )
    add("--max_prompt_length", type=int, help="of a longer pair's prompt (half of max_length)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the model's own")
    mesh_flags.add_arguments(parser)
    add("--bootstrap", type=int, default=1000, metavar="SAMPLES", help="of the intervals (1000)")
    add("--seed", type=int, default=0, help="of the intervals")
    add("--output", metavar="FILE.json", help="the numbers as JSON")
    add("--html", metavar="FILE", help="a page with the numbers and their distributions")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or not what was asked for.
        FloatingPointError: the model gives no finite log-probs.
    """
    _check(args)
    from zephyr_jax.evaluation.documents import choose

    with mesh_flags.all_devices(args.tensor, args.fsdp):
        rows = _rows(args.rows)
        chosen = choose(args.data_dir, args.dataset, args.split, args.limit or 0)
        _check_kind(args, chosen)
        _evaluate(args, chosen, rows)


def _check(args: argparse.Namespace) -> None:
    """What is wrong by itself."""
    for name, least in (("limit", 1), ("rows", 1), ("max_length", 2), ("max_prompt_length", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    if args.seq_len < 2:
        raise ValueError(f"--seq_len={args.seq_len} must be at least 2")
    if args.bootstrap < 100:
        raise ValueError(f"--bootstrap={args.bootstrap} is too few for 95%; draw at least 100")
    if args.seed < 0:
        raise ValueError(f"--seed={args.seed} must be 0 or more")
    if args.beta is not None and not 0 < args.beta < float("inf"):
        raise ValueError(f"--beta={args.beta} must be a number above 0")
    if args.beta is not None and args.reference is None:
        raise ValueError(f"--beta={args.beta} is of implicit rewards; give --reference=MODEL too")
    for name in ("output", "html"):
        path = getattr(args, name) and Path(getattr(args, name)).expanduser()
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            wrong = "it is a folder" if path.is_dir() else f"{path.absolute().parent} is no folder"
            raise ValueError(f"--{name}={path}: {wrong}; name a file in a folder that is there")


def _check_kind(args: argparse.Namespace, chosen: Chosen) -> None:
    if chosen.pairs:
        return
    for name in ("reference", "max_prompt_length"):
        value = getattr(args, name)
        if value is not None:
            raise ValueError(f"--{name}={value} is for pairs, and {args.dataset} holds dialogues")


def _rows(wanted: int | None) -> int:
    from zephyr_jax.data.packing.packing import round_up
    from zephyr_jax.sharding import axis_size

    shards = axis_size("data", "fsdp")
    if wanted is not None and wanted % shards:
        raise ValueError(
            f"--rows={wanted} is not divisible by data x fsdp = {shards}; use "
            f"{round_up(wanted, shards)}"
        )
    return wanted or round_up(_ROWS, shards)


def _limits(args: argparse.Namespace, models: list[Model], pairs: bool) -> Limits:
    """The lengths, as asked for or by default."""
    from zephyr_jax.evaluation.documents import Limits

    positions = min(model.cfg.max_position_embeddings for model in models)
    longest = args.max_length or min(args.seq_len // (1 + pairs), positions)
    if longest > positions:
        raise ValueError(f"--max_length={longest} is over the {positions} positions of the model")
    if longest > args.seq_len:
        raise ValueError(f"--max_length={longest} does not fit into --seq_len={args.seq_len}")
    prompt = args.max_prompt_length or longest // 2
    if pairs and not 0 < prompt < longest:
        raise ValueError(
            f"--max_prompt_length={prompt} leaves no room for an answer in --max_length={longest}"
        )
    return Limits(args.seq_len, longest, prompt)


def _loaded(args: argparse.Namespace, source: str) -> Model:
    from zephyr_jax.weights.checkpoint import load_model

    model = load_model(source, dtype=args.dtype)
    if args.dtype:
        model = model._replace(cfg=dataclasses.replace(model.cfg, dtype=args.dtype))
    pieces, held = model.tokenizer.vocab_size, model.cfg.vocab_size
    if pieces > held:
        raise ValueError(f"{source}: the tokenizer has {pieces} pieces, the model only {held}")
    return model


class _Chat(NamedTuple):
    settings: ChatConfig
    origin: str


def _chat(model: Model) -> _Chat:
    """How the model's own run rendered chats, or else how this project does."""
    from zephyr_jax.config.run import ChatConfig

    ours = ChatConfig(True, False, False, False, "assistant", False)
    own = model.lineage.get("config", {}).get("chat")
    if not own:
        return _Chat(ours, "the project's default")
    unknown = sorted(set(own) - set(dataclasses.asdict(ours)))
    if unknown:
        raise ValueError(
            f"the model's run has chat settings that are not known here: {', '.join(unknown)}; "
            f"evaluate it with the version of this package that trained it"
        )
    # An older run may not know a setting, and did as the default does.
    return _Chat(dataclasses.replace(ours, **own), "the model's own run")


def _check_same_vocabulary(model: Model, reference: Model, chosen: Chosen, name: str) -> None:
    """Raises a ValueError unless the reference has the same pieces under the same ids."""
    ours, theirs = model.tokenizer, reference.tokenizer
    sizes = [(m.cfg.vocab_size, m.tokenizer.vocab_size) for m in (model, reference)]
    same = sizes[0] == sizes[1]
    if same and ours.digest != theirs.digest:  # of one vocabulary there are several kinds of files
        records = chosen.parts[0].records[: min(20, chosen.parts[0].taken)]
        texts = [turn["content"] for record in records for turn in record["chosen"]]
        same = all(ours.encode(text) == theirs.encode(text) for text in texts)
    if not same:
        raise ValueError(
            f"--reference={name} has another vocabulary ({sizes[1][0]} logits, {sizes[1][1]} "
            f"pieces) than the model ({sizes[0][0]}, {sizes[0][1]}); take one with the same"
        )


def _evaluate(args: argparse.Namespace, chosen: Chosen, rows: int) -> None:
    from zephyr_jax.evaluation.documents import packed_set
    from zephyr_jax.evaluation.scoring import Scorer, score
    from zephyr_jax.evaluation.summary import Resampling, numbers

    models = [_loaded(args, args.model)]
    if args.reference is not None:
        models.append(_loaded(args, args.reference))
        _check_same_vocabulary(models[0], models[1], chosen, args.reference)
    model, limits = models[0], _limits(args, models, chosen.pairs)
    chat, beta = _chat(model), args.beta or _BETA
    with packed_set(chosen, model.tokenizer, chat.settings, limits) as documents:
        scored = score(documents, [Scorer(m.cfg, m.params) for m in models], rows)
        found = numbers(scored, documents, beta, Resampling(args.bootstrap, args.seed))
        told = _told(args, chosen, documents, model, chat, limits)
    _say(args, told, found)
    if args.html:
        from zephyr_jax.reports.inspect.page import write_page
        from zephyr_jax.reports.scores import page_body

        title = f"{args.dataset} by {args.model}"
        body = page_body(title, list(told.items()), found, scored, beta)
        write_page(Path(args.html).expanduser(), title, body)
        logging.info("%s", args.html)


def _told(
    args: argparse.Namespace,
    chosen: Chosen,
    documents: ScoreSet,
    model: Model,
    chat: _Chat,
    limits: Limits,
) -> dict[str, Any]:
    """What was scored, by what and how."""
    told: dict[str, Any] = {"model": args.model}
    told |= {name: model.lineage[name] for name in ("step", "lineage") if name in model.lineage}
    if args.reference is not None:
        told |= {"reference": args.reference, "beta": args.beta or _BETA}
    told |= {
        "sets": [
            {"name": part.member.name, "split": part.split, "digest": part.member.digest}
            for part in chosen.parts
        ],
        "kind": "pairs" if chosen.pairs else "dialogues",
        "records": documents.counts,
        "dtype": model.cfg.dtype,
        "chat": dataclasses.asdict(chat.settings),
        "chat_of": chat.origin,
        "seq_len": limits.seq_len,
        "max_length": limits.max_length,
    }
    if chosen.pairs:
        told["max_prompt_length"] = limits.max_prompt_length
    told["intervals"] = {
        "level": 0.95,
        "samples": args.bootstrap,
        "seed": args.seed,
        "resampled": "prompts, each with all its pairs" if chosen.pairs else "dialogues",
    }
    return told


def _say(args: argparse.Namespace, told: dict[str, Any], found: Numbers) -> None:
    """The table on stdout, and all of it as JSON where --output says, else below the table."""
    from zephyr_jax.evaluation.summary import OF_SOURCES, as_json, text_table

    everything = told | {
        "counts": found.counts,
        "numbers": as_json(found.all),
        "sources": {
            name: {"documents": found.source_counts[name], "numbers": as_json(own)}
            for name, own in found.sources.items()
        },
    }
    counts = ", ".join(f"{count:,} {name}" for name, count in found.counts.items())
    sets = ", ".join(f"{part['name']} {part['split']}" for part in told["sets"])
    chat = ", ".join(f"{name} {value}" for name, value in told["chat"].items())
    lines = [
        f"{args.model} on {sets}: {counts}",
        f"chat settings of {told['chat_of']}: {chat}",
        text_table(list(found.all.items())),
    ]
    for name in [x for x in OF_SOURCES if x in found.all and found.sources]:
        sizes = found.source_counts
        rows = [(f"{which} ({sizes[which]})", own[name]) for which, own in found.sources.items()]
        lines.append(f"{name} by source\n{text_table(rows)}")
    if not args.output:
        lines.append(json.dumps(everything))
    sys.stdout.write("\n\n".join(lines) + "\n")
    if args.output:
        path = Path(args.output).expanduser()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            temporary.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        logging.info("%s", path)
