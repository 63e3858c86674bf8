"""A model's scores on prepared sets, from loading it to numbers with intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

from zephyr_jax.config.run import ChatConfig
from zephyr_jax.data.packing.packing import round_up
from zephyr_jax.evaluation.documents import Limits, SelectedRecords, pack_records, select_records
from zephyr_jax.evaluation.scoring import Scorer, score
from zephyr_jax.evaluation.summary import Resampling, as_json, summarize
from zephyr_jax.sharding import axis_size
from zephyr_jax.weights.checkpoint import Model, load_model

_ROWS = 8
_OURS = ChatConfig(True, False, False, False, "assistant", False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is scored by what and how; None and "" stand for a default."""

    model: str
    dataset: str
    data_dir: str = "data"
    split: str = ""  # each set's held-out split
    limit: int | None = None  # all records
    reference: str | None = None
    beta: float | None = None  # 0.1
    seq_len: int = 2048
    rows: int | None = None  # 8, rounded up to what the mesh shards
    max_length: int | None = None  # seq_len of dialogues, half of it of pairs
    max_prompt_length: int | None = None  # half of max_length
    dtype: str | None = None  # the model's own
    bootstrap: int = 1000
    seed: int = 0


def evaluate(settings: Settings) -> dict[str, Any]:
    """Returns the settings in full and, under `numbers` and `sources`, all numbers as plain dicts.

    Runs on the mesh that is set. docs/evaluation.md defines every number.

    Raises:
        FileNotFoundError, ValueError: if a model or set is missing, or settings do not fit it.
        FloatingPointError: if the model gives no finite log-probs.
    """
    rows = _rows(settings.rows)
    selected = select_records(
        settings.data_dir, settings.dataset, settings.split, settings.limit or 0
    )
    if not selected.pairs:
        for name in ("reference", "max_prompt_length"):
            if (value := getattr(settings, name)) is not None:
                raise ValueError(f"--{name}={value} is for pairs; {settings.dataset} has dialogues")
    models = [_load(settings.model, settings.dtype)]
    if settings.reference is not None:
        models.append(_load(settings.reference, settings.dtype))
        _check_same_vocabulary(models[0], models[1], selected, settings.reference)
    limits = _limits(settings, models, selected.pairs)
    model, beta = models[0], settings.beta or 0.1
    chat, chat_of = _chat(model)
    documents = pack_records(selected, model.tokenizer, chat, limits)
    scored = score(documents, [Scorer(each.cfg, each.params) for each in models], rows)
    results = summarize(scored, documents, beta, Resampling(settings.bootstrap, settings.seed))
    out: dict[str, Any] = {"model": settings.model}
    out |= {name: model.lineage[name] for name in ("step", "lineage") if name in model.lineage}
    if settings.reference is not None:
        out |= {"reference": settings.reference, "beta": beta}
    sets = [
        {"name": part.member.name, "split": part.split, "digest": part.member.digest}
        for part in selected.parts
    ]
    out |= {"sets": sets, "kind": "pairs" if selected.pairs else "dialogues"}
    out |= {"records": documents.counts, "dtype": model.cfg.dtype}
    out |= {"chat": dataclasses.asdict(chat), "chat_of": chat_of}
    out |= limits._asdict()
    out["intervals"] = {"level": 0.95, "samples": settings.bootstrap, "seed": settings.seed}
    out |= {"counts": results.counts, "numbers": as_json(results.all)}
    out["sources"] = {
        name: {"documents": results.source_counts[name], "numbers": as_json(own)}
        for name, own in results.sources.items()
    }
    return out


def _rows(requested: int | None) -> int:
    shards = axis_size("data", "fsdp")
    if requested is not None and requested % shards:
        raise ValueError(
            f"--rows={requested} is not divisible by data x fsdp = {shards}; use "
            f"{round_up(requested, shards)}"
        )
    return requested or round_up(_ROWS, shards)


def _limits(settings: Settings, models: list[Model], pairs: bool) -> Limits:
    """The lengths, as requested or by default."""
    positions = min(model.cfg.max_position_embeddings for model in models)
    default = settings.seq_len // 2 if pairs else settings.seq_len
    longest = settings.max_length or min(default, positions)
    if longest > positions:
        raise ValueError(f"--max_length={longest} is over the {positions} positions of the model")
    if longest > settings.seq_len:
        raise ValueError(f"--max_length={longest} does not fit into --seq_len={settings.seq_len}")
    prompt = settings.max_prompt_length or longest // 2
    if pairs and not 0 < prompt < longest:
        raise ValueError(
            f"--max_prompt_length={prompt} leaves no room for an answer in --max_length={longest}"
        )
    return Limits(settings.seq_len, longest, prompt)


def _load(source: str, dtype: str | None) -> Model:
    model = load_model(source, dtype=dtype)
    if dtype:
        model = model._replace(cfg=dataclasses.replace(model.cfg, dtype=dtype))
    size, held = model.tokenizer.vocab_size, model.cfg.vocab_size
    if size > held:
        raise ValueError(f"{source}: the tokenizer has {size} tokens, the model only {held}")
    return model


def _chat(model: Model) -> tuple[ChatConfig, str]:
    """How the model's own run rendered chats, or else how this project does; and which it is."""
    own = model.lineage.get("config", {}).get("chat")
    if not own:
        return _OURS, "the project's default"
    unknown = sorted(set(own) - set(dataclasses.asdict(_OURS)))
    if unknown:
        raise ValueError(
            f"the model's run has unknown chat settings: {', '.join(unknown)}; evaluate it with "
            "the version of this package that trained it"
        )
    # An older run may lack a setting, and did as the default does.
    return dataclasses.replace(_OURS, **own), "the model's own run"


def _check_same_vocabulary(
    model: Model, reference: Model, selected: SelectedRecords, name: str
) -> None:
    """Raises a ValueError unless the reference has the same tokens under the same ids."""
    ours, theirs = model.tokenizer, reference.tokenizer
    sizes = [(m.cfg.vocab_size, m.tokenizer.vocab_size) for m in (model, reference)]
    same = sizes[0] == sizes[1]
    if same and ours.digest != theirs.digest:  # one vocabulary comes in several kinds of files
        first = selected.parts[0]
        records = [first.records[i] for i in range(min(20, first.n_records))]
        texts = [turn["content"] for record in records for turn in record["chosen"]]
        same = all(ours.encode(text) == theirs.encode(text) for text in texts)
    if not same:
        raise ValueError(
            f"--reference={name} has another vocabulary ({sizes[1][0]} logits, {sizes[1][1]} "
            f"tokens) than the model ({sizes[0][0]}, {sizes[0][1]}); use one with the same"
        )
