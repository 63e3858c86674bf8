"""Records of prepared sets, packed as in training, and the log-probs that models give them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from zephyr_jax.config.run import ChatConfig, MistralConfig
from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.documents import Rendering, document_of, document_table
from zephyr_jax.data.packing.plan import usable_documents
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.attention import ONE_CALL
from zephyr_jax.models.mistral import ForwardOptions, as_module, token_scores
from zephyr_jax.sharding import named_sharding, per_device, platform, reshard, spec, step_options
from zephyr_jax.storage import is_remote
from zephyr_jax.types import Params, Rows
from zephyr_jax.weights.checkpoint import Model


class RecordSet(NamedTuple):
    """Records of one split of one prepared set: dialogues, or pairs."""

    name: str
    split: str
    digest: str  # of the whole set
    records: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class ScoreSet:
    """Packed documents; those of row i are `plan[i]`, indices into the other fields."""

    documents: list[packing.Document]  # N
    plan: list[list[int]]
    sources: np.ndarray  # where each is from, N strings
    prompts: np.ndarray  # N; equal where the prompts are
    pairs: bool
    seq_len: int
    counts: dict[str, int]  # of what was read, cut and dropped


def stack_rows(rows: Sequence[list[packing.Document]], n_rows: int, seq_len: int) -> Rows:
    """Documents row by row as arrays `n_rows seq_len` in NumPy; empty rows end them."""
    stacked = np.zeros(n_rows, packing.row_dtype(seq_len, 0))
    for at, documents in enumerate(rows):
        stacked[at] = packing.build_row(documents, seq_len, 0)
    arrays: Any = packing.row_arrays(stacked)
    return Rows(*arrays)


class SequenceTargets(NamedTuple):
    """Inputs of a model, and the continuations that end behind them, each one token later."""

    inputs: tuple[int, ...]
    continuations: list[tuple[int, ...]]


class Shared(NamedTuple):
    """Sequences that begin alike as one document: the common prefix once, then a branch of each."""

    prefix: int  # tokens
    members: list[SequenceTargets]

    @property
    def length(self) -> int:
        """All tokens of the document."""
        return self.prefix + sum(len(x.inputs) - self.prefix for x in self.members)

    def document(self) -> packing.Document:
        """The prefix as branch 0, what follows it in member i as branch i + 1."""
        rests = [x.inputs[self.prefix :] for x in self.members]
        tokens = [*self.members[0].inputs[: self.prefix], *itertools.chain(*rests)]
        lengths = [len(rest) for rest in rests]
        branches = np.repeat(np.arange(len(rests) + 1), [self.prefix, *lengths])
        positions = [*range(self.prefix), *(self.prefix + i for n in lengths for i in range(n))]
        ids, at = np.asarray(tokens, np.int32), np.asarray(positions, np.int32)
        return packing.Document(ids, at, branches.astype(np.uint8), np.zeros(len(ids), bool))

    def targets(self) -> Iterator[tuple[tuple[Any, ...], int, int]]:
        """Of every target: its continuation's key, the index of its predictor, its id."""
        start = 0
        for member in self.members:
            for continuation in member.continuations:
                first = len(member.inputs) - len(continuation)
                for i, token in enumerate(continuation, first):
                    at = i if i < self.prefix else start + i
                    yield (member.inputs, continuation), at, token
            start += len(member.inputs) - self.prefix


def share_prefixes(sequences: Sequence[SequenceTargets], capacity: int) -> list[Shared]:
    """The sequences in documents of at most `capacity` tokens (a longer one alone), few in all.

    In sorted order each joins the document before it, where that costs fewer tokens than one of its
    own: the common prefix may get shorter, and then each earlier branch grows by the difference.
    """
    out: list[Shared] = []
    for sequence in sorted(sequences):
        if out:
            before = out[-1]
            both = before.members[-1].inputs[: before.prefix], sequence.inputs
            unequal = (i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
            prefix = next(unequal, min(map(len, both)))
            joined = Shared(prefix, [*before.members, sequence])
            added = joined.length - before.length
            few = len(before.members) < 255  # branches are stored in a byte
            if few and added < len(sequence.inputs) and joined.length <= capacity:
                out[-1] = joined
                continue
        out.append(Shared(len(sequence.inputs), [sequence]))
    return out


def chat_of(model: Model) -> tuple[ChatConfig, str]:
    """How the model's own run rendered chats, or else the project's way; and which it is."""
    if own := model.lineage.get("config", {}).get("chat"):
        return ChatConfig(**own), "the model's own run"
    return ChatConfig(True, False, False, False, "assistant", False), "the project's default"


def check_same_vocabulary(flag: str, both: Sequence[Model], texts: Sequence[str]) -> None:
    """Raises a ValueError unless the reference that the flag names has the model's tokens."""
    sizes = [(model.cfg.vocab_size, model.tokenizer.vocab_size) for model in both]
    ours, theirs = ([model.tokenizer.encode(text) for text in texts] for model in both)
    if sizes[0] != sizes[1] or ours != theirs:  # one vocabulary comes in several kinds of files
        raise ValueError(
            f"{flag} has another vocabulary ({sizes[1][0]} logits, {sizes[1][1]} tokens) than the "
            f"model ({sizes[0][0]}, {sizes[0][1]}); use one with the same"
        )


class Scored(NamedTuple):
    """Sums over the target tokens of `N` documents, by branch: 0 dialogue, 1 chosen, 2 rejected."""

    logps: np.ndarray  # N 3 float64, nats
    tokens: np.ndarray  # N 3 float64, how many were summed
    ref_logps: np.ndarray | None = None  # N 3; None without a reference


def select_records(data_dir: str, dataset: str, split: str = "", limit: int = 0) -> list[RecordSet]:
    """The records (0: all) of comma-separated sets; `split` "" is the held-out one of each."""
    sets = []
    for name in dict.fromkeys(name.strip() for name in dataset.split(",")):
        folder = prepare.set_folder(data_dir, name)
        if is_remote(folder):
            raise ValueError(f"{folder} is not on this machine; copy the set to a disk here")
        _, held_out = prepare.report(folder)["rows"]["kept"]
        records = prepare.read_split(folder, split or held_out)
        digest, selected = prepare.dataset_digest(folder), records[:limit] if limit else records
        sets.append(RecordSet(name, split or held_out, digest, selected))
    if len({"chosen" in each.records[0] for each in sets}) > 1:
        raise ValueError(f"{dataset} mixes dialogues and pairs; evaluate them one after another")
    return sets


def pack_records(
    sets: Sequence[RecordSet], tok: Tokenizer, rendering: Rendering, seq_len: int
) -> ScoreSet:
    """Renders, cuts and packs the records into rows of `seq_len` tokens; equal pairs count once."""
    pairs = rendering.pairs
    total = sum(len(each.records) for each in sets)
    every = ((each, n, record) for each in sets for n, record in enumerate(each.records))
    bar = tqdm(every, total=total, desc="tokenize", unit="record", disable=None)
    documents, sources, prompts = [], [], []
    for number, (part, n, record) in enumerate(bar):
        place = f"{part.name} {part.split}, record {n}"
        documents.append(document_of(tok, rendering, record, place))
        sources.append(record.get("source") or (part.name if len(sets) > 1 else ""))
        prompts.append(json.dumps(record["chosen"][:-1]) if pairs else str(number))
    usable, counts, kept = usable_documents(
        rendering, seq_len, document_table(documents), np.ones(total, int), training=False
    )
    if not len(usable):
        names = ", ".join(f"{each.name} {each.split}" for each in sets)
        raise ValueError(f"no record of {names} can be scored: {counts}")
    return ScoreSet(
        documents=[documents[i] for i in usable],
        plan=packing.best_fit(kept["length"].tolist(), seq_len),
        sources=np.asarray(sources)[usable],
        prompts=np.unique(np.asarray(prompts)[usable], return_inverse=True)[1],
        pairs=pairs,
        seq_len=seq_len,
        counts=counts,
    )


def score(documents: ScoreSet, models: Sequence[Model], n_rows: int) -> Scored:
    """The sums of all documents, in their order, whatever their neighbors in a row.

    `models` are the model and, for rewards, a reference of the same vocabulary; of equal ones every
    difference is exactly 0. `n_rows` of a batch is a multiple of the mesh's data x fsdp.
    """
    largest = max(int(max(document.tokens)) for document in documents.documents)
    last = min(model.cfg.vocab_size for model in models) - 1
    if largest > last:
        rule = f"the model ids 0 to {last}; use its own tokenizer"
        raise ValueError(f"a text has token id {largest}, {rule}")
    names = ["logps", "ref_logps"][: len(models)]
    n_documents, pending = len(documents.documents), None
    sums = {name: np.zeros((n_documents, 3)) for name in ("tokens", *names)}
    n_tokens = sum(len(document.tokens) for document in documents.documents)
    with tqdm(total=n_tokens, desc="score", unit="token", unit_scale=True) as bar:
        for start in range(0, len(documents.plan), n_rows):
            plan = documents.plan[start : start + n_rows]
            parts = [[documents.documents[i] for i in indices] for indices in plan]
            rows = stack_rows(parts, n_rows, documents.seq_len)
            inputs = jax.device_put(rows, named_sharding(spec("BT")))
            arrays = [program(_score)(m.cfg, m.params, inputs, documents.pairs) for m in models]
            if pending is not None:  # one batch late, so that the devices never wait for the host
                _add(sums, *pending)
            pending = rows, plan, dict(zip(names, arrays, strict=True))
            bar.update(int((rows.segments > 0).sum()))
        if pending is not None:
            _add(sums, *pending)
    same = np.array([document.equal for document in documents.documents], bool)
    for values in sums.values():  # two places of a row round the same tokens differently
        values[same, 2] = values[same, 1]
    bad = int((~np.isfinite(sums["logps"])).any(axis=1).sum())
    if bad:
        problem = "documents have no finite log-prob: check the weights, or try --dtype=float32"
        raise FloatingPointError(f"{bad} of {n_documents} {problem}")
    return Scored(**sums)


@functools.cache
def program(function: Callable[..., Any]) -> Callable[..., Any]:
    """`_score` or `score_at`, jitted with the compiler's options of a training step."""
    return jax.jit(function, static_argnames=("cfg", "branched"), compiler_options=step_options())


def _score(cfg: MistralConfig, params: Params, rows: Rows, branched: bool) -> Array:
    return token_scores(cfg, params, rows, branched=branched).logps


def _add(
    sums: dict[str, np.ndarray], rows: Rows, plan: list[list[int]], arrays: dict[str, Array]
) -> None:
    """Adds a batch to the sums of its documents, in float64; waits for the devices."""
    # Document k of a row is its segment k+1.
    which = np.zeros(rows.segments.shape, int)
    for at, indices in enumerate(plan):
        which[at] = np.asarray([0, *indices])[np.asarray(rows.segments[at])]
    targets = np.asarray(rows.loss_mask)
    place = which[targets], np.asarray(rows.branches)[targets]
    for name, values in (arrays | {"tokens": rows.loss_mask}).items():
        np.add.at(sums[name], place, np.asarray(values)[targets].astype(np.float64))


def attention_for(branched: bool, tokens: int, window: int | None) -> str:
    """The attention of rows with any number of branches: where splash runs twice, it knows two."""
    twice = tokens > ONE_CALL or (window or tokens) < tokens
    return "tiled" if branched and twice and platform() == "tpu" else "auto"


def score_at(
    cfg: MistralConfig, params: Params, rows: Rows, at: Array, targets: Array, branched: bool
) -> tuple[Array, Array]:
    """Log-probs `B N` of the targets that tokens `at` predict, and which are likeliest there."""
    model, branches = as_module(cfg, params), rows.branches if branched else None
    attention = attention_for(branched, rows.tokens.shape[1], cfg.sliding_window)
    options = ForwardOptions(attention=attention)
    hidden = model.hidden(rows.tokens, rows.segments, branches, rows.positions, options)
    hidden = reshard(hidden, "BTD")
    take = per_device(
        lambda x, i: jnp.take_along_axis(x, i[..., None], axis=1), ("BTD", "BT"), spec("BTD")
    )

    def compare(logits: Array, token: Array) -> tuple[Array, Array]:
        own = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == token

    compare = per_device(compare, ("BT.", "BT"), (spec("BT"), spec("BT")))

    def block(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
        return None, compare(reshard(model.logits(take(hidden, part[0])), "BT."), part[1])

    blocks = [x.reshape(len(x), -1, 64).swapaxes(0, 1) for x in (at, targets)]
    _, out = jax.lax.scan(block, None, (blocks[0], blocks[1]))
    logps, firsts = (reshard(x.swapaxes(0, 1).reshape(at.shape), "..") for x in out)
    return logps, firsts
