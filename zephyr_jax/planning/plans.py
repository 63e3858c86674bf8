"""Plans of runs on slices, each compiled in a process of its own, and of sampling; their tables."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.inference.decoding import CHUNK, rounded, traced
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.planning import compiling, hlo
from zephyr_jax.planning.compiling import Case, Compiled, Topology, bytes_of, make_case
from zephyr_jax.planning.estimate import estimate, memory, timed
from zephyr_jax.sharding import make_mesh
from zephyr_jax.training.sizes import LEAST_FIRST, with_train

# docs/recipes.md: the published runs' own counts, of packed UltraChat and of UltraFeedback
_PUBLISHED_TOKENS, _PUBLISHED_PAIRS = 139_000 * 2048, 61_135
_REPLIES = 64_000 * 4  # of a set as large as UltraFeedback
_HEAD = ["run", "slice", "mesh", "GiB a device", "step", "MFU", "calibrated", "hours", "chip-hours"]
_SAMPLE_HEAD = ("model", "slice", "mesh", "GiB a device", "replies at once", "prefill", "a token")
_SAMPLE_HEAD += ("times the bound", "tokens/s", "hours", "chip-hours")


class PlanOptions(NamedTuple):
    """How runs are planned."""

    rows: int | None = None  # of a batch of pairs; None: as many as real pairs fill
    examples: int | None = None  # rows or pairs of an epoch; None: as published, if the set is
    auto: bool = False  # choose mesh and micro-batches, and halve the latter until it fits
    processes: int = 1  # parallel compilations


def make_plans(
    configs: Sequence[RunConfig], topologies: Sequence[Topology], options: PlanOptions
) -> list[dict[str, Any]]:
    """The plan of every run on every slice; a ValueError if a slice cannot be described here."""
    for topology in topologies:
        compiling.describe(topology)
    plans: list[dict[str, Any]] = []
    cases: dict[int, Case] = {}  # by position in plans
    for config in configs:
        for topology in topologies:
            plans.append({"config": config.name, "topology": topology.name})
            try:
                cases[len(plans) - 1] = make_case(config, topology, options.rows, options.auto)
            except ValueError as error:
                plans[-1]["refused"] = str(error)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, max_tasks_per_child=1) as pool:
        done = pool.map(plan_of, cases.values(), itertools.repeat(options))
        bar = tqdm(done, total=len(cases), desc="compile", unit="program")
        for i, plan in zip(cases, bar, strict=True):
            plans[i] = plan
    return plans


def plan_of(case: Case, options: PlanOptions) -> dict[str, Any]:
    """The plan of one case: numbers by name, and advice if it does not fit."""
    done = compiling.report(*compiling.lower(case), case.topology, case.config.mesh)
    held = memory(case, done)
    if options.auto and not held["fits"] and (less := smaller(case, options.rows)):
        return plan_of(less, options)
    config, topology, train = case.config, case.topology, case.config.train
    plan: dict[str, Any] = {"config": config.name, "topology": topology.name}
    plan |= {"chips": topology.chips, "devices": topology.devices, "mesh": config.mesh.axes}
    plan |= {"rows": case.rows, "micro_batches": train.micro_batches, "remat": train.remat}
    plan |= {"compiler_options": done.options, **held, "compile_seconds": done.seconds}
    if done.text:
        plan |= estimate(case, done)
    if not plan["fits"]:
        plan["advice"] = [_advice(case, plan)]
    elif options.auto:
        words = f"--config.train.micro_batches={train.micro_batches} --config.train.remat="
        plan["advice"] = [f'{words}"{train.remat}"']
    if done.text and (steps := step_count(config, options.examples)):
        hours = steps * plan["seconds"]["step"] / 3600
        plan |= {"steps": steps, "hours": hours, "chip_hours": hours * topology.chips}
    return plan


def _advice(case: Case, plan: dict[str, Any]) -> str:
    usable = plan["gib"]["usable"]
    kinds = ("parameters", "moments", "frozen base")
    state = sum(plan["gib_by_kind"].get(kind, 0.0) for kind in kinds)
    train, mesh = case.config.train, case.config.mesh
    ways = []
    if state > 0.9 * usable:
        more = "raise mesh.fsdp" if mesh.data > case.topology.slices else "take more chips, or LoRA"
        ways.append(f"parameters and moments alone are {state:.2f} GiB: {more}")
    else:
        if train.remat != "full":
            ways.append("--config.train.remat=full")
        if case.rows // (mesh.data * mesh.fsdp) > train.micro_batches:
            ways.append(f"--config.train.micro_batches={2 * train.micro_batches}")
    ways = ways or ["a larger mesh.tensor, or more chips"]
    return f"{plan['gib']['needed'] - usable:.2f} GiB too many; {' and '.join(ways)}"


def step_count(config: RunConfig, examples: int | None = None) -> int | None:
    """The number of steps of a run; None if the number of examples (rows, pairs) is not known."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    dataset = config.data.dataset  # a string, or weights by set
    if examples is None and config.dpo and dataset == "ultrafeedback/binarized":
        examples = _PUBLISHED_PAIRS
    elif examples is None and dataset == "ultrachat/200k":
        examples = _PUBLISHED_TOKENS // config.data.seq_len
    return None if examples is None else train.epochs * max(1, examples // train.batch_size)


def smaller(case: Case, rows: int | None) -> Case | None:
    """The case that recomputes more, or with micro-batches of half the size; None at one row."""
    train, mesh = case.config.train, case.config.mesh
    if train.remat in LEAST_FIRST[:-1]:
        config = with_train(case.config, remat=LEAST_FIRST[LEAST_FIRST.index(train.remat) + 1])
        return make_case(config, case.topology, rows)
    micro_batches = 2 * train.micro_batches
    if micro_batches * mesh.data * mesh.fsdp > case.rows:
        return None
    return make_case(with_train(case.config, micro_batches=micro_batches), case.topology, rows)


def table(plans: Sequence[dict[str, Any]]) -> str:
    """The plans as a Markdown table, a slice a row, and their warnings and advice below."""
    notes = [
        f"* {plan['config']} on {plan['topology']}: {note}"
        for plan in plans
        for note in [*plan.get("warnings", []), *plan.get("advice", [])]
    ]
    lines = [markdown(_HEAD, [_row(plan) for plan in plans]), *notes]
    return "\n".join([*lines, ""] if notes else lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what a row lacks is a dash."""
    filled = [head, ["---"] * len(head)]
    filled += [[*row, *["-"] * (len(head) - len(row))] for row in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in filled)


def first_cells(plan: dict[str, Any]) -> list[str]:
    """Run, slice, mesh and memory."""
    sizes = " ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
    fits = "fits" if plan["fits"] else "**does not fit**"
    memory = f"{plan['gib']['needed']:.2f} of {plan['gib']['usable']:.2f}, {fits}"
    return [plan["config"], plan["topology"], sizes or "one device", memory]


def _row(plan: dict[str, Any]) -> list[str]:
    if "refused" in plan:
        return [plan["config"], plan["topology"], "-", plan["refused"]]
    cells = first_cells(plan)
    if not plan["fits"]:
        return cells
    step, mfu, k = plan["seconds"]["step"], 100 * plan["mfu"], plan["calibration"]
    cells += [f"{step:.2f} s", f"{mfu:.0f}%", f"{step / k:.2f} s, {mfu * k:.0f}%" if k else "-"]
    hours = (("hours", "{:.1f}"), ("chip_hours", "{:,.0f}"))
    return cells + [form.format(plan[name]) for name, form in hours if name in plan]


def sampling_mesh(config: RunConfig, topology: Topology) -> MeshConfig:
    """The config's mesh if it shards heads; else one that does as far as possible, then rows."""
    if config.mesh.tensor > 1:
        return config.mesh.sized(topology.devices, f"of {topology.name}")
    tensor = math.gcd(config.model.num_key_value_heads, topology.devices // topology.slices)
    return MeshConfig(topology.devices // tensor, 1, tensor)


def sample_plan(
    config: RunConfig,
    topology: Topology,
    rows: int,
    lengths: tuple[int, int],
    replies: int | None = None,
) -> dict[str, Any]:
    """The plan of answering with `rows` replies at once, in all `replies` (default: 256,000).

    `lengths` are tokens of a prompt and of a reply. A ValueError if mesh or model cannot. A token
    of every row reads all weights but the embedding, and the whole cache: the bytes' bound.
    """
    cfg, chip, mesh = config.model, topology.chip, sampling_mesh(config, topology)
    shards, most = mesh.data * mesh.fsdp, cfg.max_position_embeddings
    if rows % shards or sum(lengths) > most:
        raise ValueError(
            f"{rows} replies at once must be divisible by data x fsdp = {shards} on "
            f"{topology.name}, and {lengths[0]} + {lengths[1]} tokens at most {most} positions"
        )
    prompt = rounded(lengths[0], 64 if lengths[0] <= CHUNK else CHUNK)
    size = (rows, prompt, rounded(lengths[1], 64))
    sampling = SamplingParams(temperature=0.7, top_p=0.95)  # as collect_feedback's
    with jax.set_mesh(make_mesh(**mesh.axes, devices=compiling.describe(topology))):
        params = jax.tree.map(lambda x: x.update(dtype=cfg.dtype), abstract_params(cfg))
        *programs, state = traced(cfg, params, size, sampling)
        lowered = [one.lower(lowering_platforms=("tpu",)) for one in programs]
    held = {"parameters": bytes_of(params), "cache": bytes_of((state.cache.k, state.cache.v))}
    done = [compiling.report(one, {}, held, topology, mesh) for one in lowered]
    needed = max(one.wanted or one.peak / 2**30 for one in done)
    plan: dict[str, Any] = {"config": config.name, "topology": topology.name}
    plan |= {"chips": topology.chips, "mesh": mesh.axes, "rows": rows}
    plan |= {"prompt_tokens": prompt, "new_tokens": lengths[1]}
    plan["fits"] = all(one.text for one in done)
    plan["gib"] = {"needed": needed, "usable": chip.usable_gib}
    plan["gib_by_kind"] = {kind: size / 2**30 for kind, size in held.items()}
    if not plan["fits"]:
        return plan
    prefill = _program_seconds(done[0], topology, mesh, -(-prompt // CHUNK))
    read = sum(held.values()) - bytes_of(params["embed"])
    bound = read / chip.hbm_rate
    # What is copied ahead into vector memory has no estimate of its own.
    token = max(bound, _program_seconds(done[1], topology, mesh, size[2]) / size[2])
    batch, replies = prefill + token * lengths[1], replies or _REPLIES
    hours = -(-replies // rows) * batch / 3600
    plan |= {"seconds": {"prefill": prefill, "token": token, "bound": bound}}
    plan |= {"bytes_a_token": read, "tokens_per_second": rows * lengths[1] / batch}
    return plan | {"replies": replies, "hours": hours, "chip_hours": hours * topology.chips}


def _program_seconds(done: Compiled, topology: Topology, mesh: MeshConfig, rounds: int) -> float:
    """The time of a program; `rounds` of the loop that ends by data."""
    program = hlo.parse(done.text)
    times = hlo.count(program, {"while$": rounds}).times
    return timed(program, times, topology, mesh.axes)[0]["step"]


def sample_table(plans: list[dict[str, Any]]) -> str:
    """The plans as a Markdown table, a batch a row."""
    return markdown(_SAMPLE_HEAD, [[*first_cells(plan), *_sample_cells(plan)] for plan in plans])


def _sample_cells(plan: dict[str, Any]) -> list[str]:
    if not plan["fits"]:
        return [str(plan["rows"])]
    prefill, token, bound = plan["seconds"].values()
    cells = [str(plan["rows"]), f"{1e3 * prefill:.0f} ms", f"{1e3 * token:.2f} ms"]
    cells += [f"{token / bound:.2f}", f"{plan['tokens_per_second']:,.0f}"]
    return [*cells, f"{plan['hours']:.1f}", f"{plan['chip_hours']:,.0f}"]
