"""Plans of several runs on several slices, compiled in processes of their own."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zephyr_jax.config.run import RunConfig
from zephyr_jax.planning.compiling import Case, compiled, make_case
from zephyr_jax.planning.estimate import as_json, estimate, memory
from zephyr_jax.planning.examples import steps_of
from zephyr_jax.planning.search import chosen, halved, layouts
from zephyr_jax.planning.topologies import Topology, describe


def make_plans(
    configs: Sequence[RunConfig],
    topologies: Sequence[Topology],
    args: argparse.Namespace,
    cache: Path,
) -> list[dict[str, Any]]:
    """The plan of every run on every slice, in this order; with args.search the best of several.

    Raises:
        ValueError: if a topology cannot be described here.
    """
    for topology in topologies:
        describe(topology)
    wanted: list[tuple[RunConfig, Topology, list[Case], str]] = []
    for config in configs:
        for topology in topologies:
            cases, refused = [], ""
            try:
                auto = args.auto or config.mesh.auto
                own = chosen(config, topology, args.rows) if auto else config
                cases = [make_case(own, topology, args.rows)]
            except ValueError as error:
                refused = str(error)
            if args.search:
                found = layouts(config, topology, args.rows)
                cases += [case for case in found if case not in cases]
            wanted.append((config, topology, cases, refused))
    flat = [case for _, _, cases, _ in wanted for case in cases]
    answers = iter(_all(flat, args, cache))
    plans: list[dict[str, Any]] = []
    for config, topology, cases, refused in wanted:
        here = [next(answers) for _ in cases]
        if args.search:
            fitting = [plan for plan in here if plan["fits"]]
            here = (
                sorted(fitting, key=lambda plan: plan["seconds"]["step"])[: args.search] or here[:1]
            )
        if not here:
            here = [{"config": config.name, "topology": topology.name, "refused": refused}]
        plans += here
    return plans


def _all(cases: Sequence[Case], args: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    """The plans of some cases, with progress."""
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(
            min(args.processes, max(1, len(cases))), mp_context=context, max_tasks_per_child=1
        ) as pool,
        tqdm(total=len(cases), desc="compile", unit="program") as bar,
    ):
        halve = args.auto and not args.search
        waiting = [
            pool.submit(plan_of, case, cache, args.examples, args.rows, halve=halve)
            for case in cases
        ]
        for one in waiting:
            one.add_done_callback(lambda _: bar.update())
        try:
            return [one.result() for one in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def plan_of(
    case: Case,
    cache: Path | None,
    examples: int | None = None,
    rows: int | None = None,
    *,
    halve: bool = False,
) -> dict[str, Any]:
    """The plan of one case: numbers by name, and advice where it does not fit.

    With `halve` the batch is cut into ever more portions until it does.
    """
    done = compiled(case, cache)
    if halve and not memory(case, done).fits and (smaller := halved(case, rows)):
        return plan_of(smaller, cache, examples, rows, halve=True)
    found = estimate(case, done) if done.text else None
    told = as_json(case, done, found)
    if not told["fits"]:
        told["advice"] = [_advice(case, told)]
    elif found is not None and (steps := steps_of(case.config, examples)):
        hours = steps * found.step / 3600
        told |= {"steps": steps, "hours": hours, "chip_hours": hours * case.topology.chips}
    return told


def _advice(case: Case, told: dict[str, Any]) -> str:
    """What would make it fit."""
    over = told["gib"]["needed"] - told["gib"]["usable"]
    state = sum(told["gib_by_kind"].get(x, 0.0) for x in ("parameters", "moments", "frozen base"))
    train, mesh = case.config.train, case.config.mesh
    ways = []
    if state > 0.9 * told["gib"]["usable"]:
        spread = mesh.data > case.topology.slices
        way = "give mesh.fsdp what mesh.data has" if spread else "take more chips, or LoRA"
        ways.append(f"parameters and moments alone are {state:.2f} GiB: {way}")
    else:
        per_shard = case.rows // (mesh.data * mesh.fsdp)
        if train.remat != "full":
            ways.append("--config.train.remat=full")
        if per_shard > train.micro_batches:
            ways.append(f"--config.train.micro_batches={2 * train.micro_batches}")
        if not ways:
            ways.append("a larger mesh.tensor, or more chips")
    return f"{over:.2f} GiB too many; {' and '.join(ways)}"
