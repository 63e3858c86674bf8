"""A model of ours in lm-eval (EleutherAI's harness), and the scoring of continuations behind it."""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from zephyr_jax.data.packing import packing
from zephyr_jax.data.text.chat import CHAT_TEMPLATE, render_text
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.answers import batched_replies
from zephyr_jax.evaluation.scoring import SequenceTargets, Shared
from zephyr_jax.evaluation.table import SUITES
from zephyr_jax.inference.decoding import cast_params
from zephyr_jax.inference.generate import adds_bos
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.sharding import BATCH, axis_size, named_sharding, spec
from zephyr_jax.weights.checkpoint import Model, params_digest
from zephyr_jax.weights.sources import load_in


def score_continuations(
    model: Model,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seq_len: int,
    n_rows: int,
    usage: collections.Counter[str],
) -> list[tuple[float, bool]]:
    """The log-prob of each continuation of its context, nats, and whether greedy decoding gives it.

    A context that does not fit the model's positions loses its first tokens. Equal requests are
    computed once, common prefixes once a document; documents are packed into rows of `seq_len`
    tokens or more, `n_rows` (a multiple of data x fsdp) at a time. `usage` adds up the `tokens`.
    """
    most = model.cfg.max_position_embeddings
    grouped: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    keys = []
    for context, continuation in requests:
        if not context or not 0 < len(continuation) <= most:
            raise ValueError(
                f"a request has {len(context)} tokens of context and {len(continuation)} of "
                f"continuation; it needs at least 1 of both, and at most {most} of the latter"
            )
        inputs = tuple([*context, *continuation][-most - 1 : -1])
        keys.append((inputs, tuple(continuation)))
        grouped.setdefault(inputs, {})[keys[-1][1]] = None
    sequences = [SequenceTargets(inputs, list(each)) for inputs, each in grouped.items()]
    longest = max((len(x.inputs) for x in sequences), default=0)
    capacity = max(seq_len, 3 * longest // 2)  # long examples as well
    documents = scoring.share_prefixes(sequences, capacity)
    sums: dict[Any, tuple[float, bool]] = dict.fromkeys(keys, (0.0, True))
    buckets: dict[int, list[Shared]] = {}
    for document in documents:
        size = seq_len if document.length <= seq_len else packing.round_up(document.length, 256)
        buckets.setdefault(size, []).append(document)
    total = sum(x.length for x in documents)
    with tqdm(total=total, desc="score", unit="token", unit_scale=True) as bar:
        for size, bucket in sorted(buckets.items(), reverse=True):
            width = min(size, packing.round_up(sum(x.length for x in bucket), 64))
            plan = packing.best_fit([x.length for x in bucket], width)
            for start in range(0, len(plan), n_rows):
                rows = [[bucket[i] for i in row] for row in plan[start : start + n_rows]]
                for key, logp, greedy in _score_rows(model, rows, width):
                    sums[key] = sums[key][0] + logp, sums[key][1] and greedy
                done = sum(x.length for row in rows for x in row)
                usage["tokens"] += done
                bar.update(done)
    if not np.isfinite([logp for logp, _ in sums.values()]).all():
        raise FloatingPointError("a continuation has no finite log-prob: try --dtype=float32")
    return [sums[key] for key in keys]


def _score_rows(
    model: Model, rows: list[list[Shared]], width: int
) -> Iterator[tuple[tuple[Any, ...], float, bool]]:
    """Of every target in some rows: its continuation's key, log-prob, if it is likeliest."""
    n_rows = packing.round_up(len(rows), axis_size(*BATCH))
    host = scoring.stack_rows([[x.document() for x in row] for row in rows], n_rows, width)
    targets: list[list[tuple[Any, int, int]]] = [[] for _ in range(n_rows)]
    for at, row in enumerate(rows):
        starts = itertools.accumulate((x.length for x in row), initial=0)
        for start, shared in zip(starts, row, strict=False):
            targets[at] += [(key, start + i, token) for key, i, token in shared.targets()]
    n = packing.round_up(max(map(len, targets)), 64)
    places = np.zeros((2, n_rows, n), np.int32)
    for at, row in enumerate(targets):
        places[:, at, : len(row)] = np.reshape([(i, token) for _, i, token in row], (-1, 2)).T
    branched = bool(host.branches.any())
    inputs = jax.device_put((host, *places), named_sharding(spec("BT")))
    score = scoring.program(scoring.score_at)
    logps, firsts = map(np.asarray, score(model.cfg, model.params, *inputs, branched))
    for at, row in enumerate(targets):
        for i, (key, _, _) in enumerate(row):
            yield key, float(logps[at, i]), bool(firsts[at, i])


class _Harness:
    """The methods that lm-eval's TemplateLM lacks: tokens, scores and replies of our model."""

    backend = "causal"
    max_gen_toks = 256
    eot_token_id = prefix_token_id = 0  # ends a text, begins one without a context
    tokenizer_name = ""  # identifies the tokenizer

    def __init__(self, model: Model, name: str, seq_len: int, n_rows: int) -> None:
        super().__init__()
        cfg, tok = model.cfg, model.tokenizer
        self._model = model._replace(params=cast_params(cfg, model.params))
        self._tok, self._name = tok, name
        self._size: dict[str, Any] = {"seq_len": seq_len, "n_rows": n_rows}
        self._adds_bos, self.max_length = adds_bos(tok), cfg.max_position_embeddings
        self.eot_token_id, self.tokenizer_name = tok.eos_id, tok.digest
        self.prefix_token_id = tok.eos_id if tok.bos_id is None else tok.bos_id
        texts = {token: text for text, token in tok.specials.items()}
        self._prefix, self._eos = texts[self.prefix_token_id], texts[tok.eos_id]
        # Behind nothing, a text of transformers loses the blank that begins it.
        letter = tok.encode("a")
        self._strips = tok.decode(letter) != tok.decode(letter, continuation=True)
        self.usage = collections.Counter[str]()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text, literal specials as tokens, with BOS where the tokenizer adds one."""
        ids = self._tok.encode(string, parse_special=True)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix)
        return [self.prefix_token_id, *ids] if add_special_tokens and self._adds_bos else ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return score_continuations(self._model, pairs, **self._size, usage=self.usage)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-prob of each text, in windows of all positions that predict each token once."""
        utils = importlib.import_module("lm_eval.utils")
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += [utils.make_disjoint_window(window) for window in windows]
            owners += [owner] * (len(pairs) - len(owners))
        scores = score_continuations(self._model, pairs, **self._size, usage=self.usage)
        sums = np.zeros(len(requests))
        np.add.at(sums, np.asarray(owners, int), [logp for logp, _ in scores])
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """A reply to each context, up to one of its stop strings; those of like length together."""
        utils = importlib.import_module("lm_eval.models.utils")
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        replies = [""] * len(requests)
        for text, group in groups.items():
            settings = utils.normalize_gen_kwargs(json.loads(text), self.max_gen_toks)
            until = utils.handle_stop_sequences(settings.pop("until", None), eos=self._eos)
            sampling = _sampling(settings, [stop for stop in until if stop])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                problem = f"leaves no context in the model's {self.max_length} positions; set fewer"
                raise ValueError(f"max_gen_toks={sampling.max_new_tokens} {problem}")
            rows: Any = [self.tok_encode(requests[i].args[0])[-room:] for i in group]
            for i, reply in batched_replies(self._model, rows, sampling, self._size["n_rows"]):
                stripped = self._strips and reply.text.startswith(" ")
                words = reply.text[1:] if stripped else reply.text
                replies[group[i]] = utils.postprocess_generated_text(words, until, None)
        return replies

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat; without a generation prompt it ends with its last content."""
        own = self._tok.chat_format
        if own is None:
            bos = "" if self._tok.bos_id is None else self._prefix
            text = bos + render_text(chat_history, add_generation_prompt)
        else:
            text = own.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        return text[: start + len(last if text.startswith(last, start) else last.strip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source, which lm-eval stores with the results."""
        return (self._tok.chat_template or CHAT_TEMPLATE) if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model."""
        digest = params_digest(self._model.params)
        return {"model": self._name, "model_dtype": self._model.cfg.dtype, "model_digest": digest}


def _sampling(settings: dict[str, Any], stop: list[str]) -> SamplingParams:
    """The settings of a task's generation; a ValueError names one that we do not have."""
    names = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int}
    greedy = not settings.pop("do_sample", False)
    values = {name: kind(settings.pop(name)) for name, kind in names.items() if name in settings}
    values |= {"temperature": 0.0} if greedy else {}
    most = int(settings.pop("max_gen_toks"))
    if settings:
        raise ValueError(f"generation_kwargs has {', '.join(settings)}; known: {', '.join(names)}")
    return SamplingParams(max_new_tokens=most, stop=stop, **values)


def harness_model(model: Model, name: str, seq_len: int = 2048, n_rows: int | None = None) -> Any:
    """The model as an `lm_eval.api.model.LM` on the ambient mesh, with rows of `seq_len` tokens."""
    api = importlib.import_module("lm_eval.api.model")
    kind = type("ZephyrJaxLM", (_Harness, api.TemplateLM), {})
    return kind(model, name, seq_len, packing.round_up(n_rows or 8, axis_size(*BATCH)))


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """The manager of lm-eval's tasks and of those in a folder; a ValueError names unknown ones."""
    try:
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=include_path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs the package {error.name}: pip install 'zephyr_jax[lm-eval]'"
        ) from error
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-eval has no task {', '.join(unknown)}; --include_path adds a folder of YAML files"
        )
    return manager


def evaluate_tasks(
    lm: Any, manager: Any, tasks: Sequence[str], suite: str = "", **options: Any
) -> dict[str, Any]:
    """lm-eval's results by its `options`; of a `suite` also the leaderboard's scores in percent."""
    harness = importlib.import_module("lm_eval")
    members = SUITES[suite] if suite else ()
    runs = [([name], {"num_fewshot": shots}) for name, shots, _ in members]
    runs += [(manager.match_tasks(list(tasks)), {})] if tasks else []
    results: dict[str, Any] = {}
    start = time.monotonic()
    for names, own in runs:
        more = {"model": lm, "task_manager": manager, "log_samples": False, **options, **own}
        for key, value in harness.simple_evaluate(tasks=names, **more).items():
            merged = isinstance(value, dict) and isinstance(results.get(key), dict)
            results[key] = results[key] | value if merged else value
    seconds = time.monotonic() - start
    settings = {name: value for name, value in options.items() if value}
    results["config"] |= settings | {"usage": dict(lm.usage), "seconds": seconds}
    if suite:
        scores = {name: 100 * results["results"][name][metric] for name, _, metric in members}
        average = sum(scores.values()) / len(scores)
        results["suite"] = {"name": suite, "scores": scores, "average": average}
    plain = importlib.import_module("lm_eval.utils").handle_non_serializable
    return json.loads(json.dumps(results, default=plain))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """lm-eval's table and results by the flags of `evaluate lm-eval`."""
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks and not args.suite:
        raise ValueError("name --tasks or a --suite")
    if args.suite and args.num_fewshot is not None and not tasks:
        raise ValueError(f"--suite={args.suite} has its own numbers of examples")
    manager = find_tasks(tasks, args.include_path)
    results = evaluate_tasks(
        harness_model(load_in(args.model, args.dtype), args.model, args.seq_len, args.rows),
        manager,
        tasks,
        args.suite,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        system_instruction=args.system or None,
        apply_chat_template=args.chat_template != "off",
        fewshot_as_multiturn=args.chat_template == "multiturn",
    )
    return f"{importlib.import_module('lm_eval.utils').make_table(results)}\n", results
