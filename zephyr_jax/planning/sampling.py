"""What replies cost on a slice: prefill and decoding of `generate`, compiled and read.

A token of every row reads all weights but the embedding, and the whole cache; the least time that
this can take is the bytes' bound.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.planning import compiling, hlo
from zephyr_jax.planning.compiling import Topology, bytes_of
from zephyr_jax.planning.estimate import timed

REPLIES = 64_000 * 4  # of a set as large as UltraFeedback
_HEAD = ("model", "slice", "mesh", "replies at once", "GiB a device", "prefill", "a token")
_HEAD += ("times the bound", "tokens/s", "hours", "chip-hours")


class SampleCase(NamedTuple):
    """Replies to a batch of prompts of one length."""

    config: RunConfig
    topology: Topology
    rows: int  # replies at once
    prompt: int  # tokens
    new: int  # tokens of a reply


def sampling_mesh(config: RunConfig, topology: Topology) -> MeshConfig:
    """The config's mesh if it shards heads; else one that does as far as possible, then rows.

    A mesh of training, which shards parameters, would gather all of them for every token.
    """
    if config.mesh.tensor > 1:
        return config.mesh.sized(topology.devices, f"of {topology.name}")
    inside = topology.devices // topology.slices
    tensor = math.gcd(config.model.num_key_value_heads, inside)
    return MeshConfig(topology.devices // tensor, 1, tensor)


def sample_plan(case: SampleCase, replies: int | None, cache: Path | None) -> dict[str, Any]:
    """The plan of one case: numbers by name; a ValueError if the mesh or the model cannot.

    `replies` are those of the whole set; None for REPLIES.
    """
    import jax

    from zephyr_jax.inference.decoding import CHUNK, rounded, traced
    from zephyr_jax.inference.sampling import SamplingParams
    from zephyr_jax.models.parameters import abstract_params

    cfg, topology, chip = case.config.model, case.topology, case.topology.chip
    mesh = sampling_mesh(case.config, topology)
    if case.rows % (mesh.data * mesh.fsdp):
        shards = f"data x fsdp = {mesh.data * mesh.fsdp} on {topology.name}"
        raise ValueError(f"--sample={case.rows} replies at once are not divisible by {shards}")
    if case.prompt + case.new > cfg.max_position_embeddings:
        raise ValueError(
            f"--lengths={case.prompt},{case.new} are more than the model's "
            f"max_position_embeddings={cfg.max_position_embeddings}; give shorter ones"
        )
    prompt = rounded(case.prompt, 64 if case.prompt <= CHUNK else CHUNK)
    size = (case.rows, prompt, rounded(case.new, 64))
    sampling = SamplingParams(temperature=0.7, top_p=0.95)  # as collect_feedback's
    with jax.set_mesh(compiling.mesh_of(topology, mesh)):
        params = jax.tree.map(lambda x: x.update(dtype=cfg.dtype), abstract_params(cfg))
        *programs, state = traced(cfg, params, size, sampling)
        lowered = [one.lower(lowering_platforms=("tpu",)) for one in programs]
    held = {"parameters": bytes_of(params), "cache": bytes_of((state.cache.k, state.cache.v))}
    where = (topology.name, tuple(mesh.axes.values()))
    done = [compiling.compile_lowered(one, held, {}, where, cache) for one in lowered]
    needed = max(one.wanted or one.peak / 2**30 for one in done)
    plan = {
        "config": case.config.name,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": mesh.axes,
        "rows": case.rows,
        "prompt_tokens": prompt,
        "new_tokens": case.new,
        "fits": all(one.text for one in done),
        "gib": {"needed": needed, "usable": chip.usable_gib},
        "gib_by_kind": {kind: size / 2**30 for kind, size in held.items()},
    }
    if not plan["fits"]:
        return plan
    prefill = _seconds(done[0], topology, mesh, -(-prompt // CHUNK))
    read = sum(held.values()) - bytes_of(params["embed"])
    bound = read / chip.hbm_rate
    # What is copied ahead into vector memory has no estimate of its own.
    token = max(bound, _seconds(done[1], topology, mesh, size[2]) / size[2])
    batch, replies = prefill + token * case.new, replies or REPLIES
    hours = -(-replies // case.rows) * batch / 3600
    return plan | {
        "seconds": {"prefill": prefill, "token": token, "bound": bound},
        "bytes_a_token": read,
        "tokens_per_second": case.rows * case.new / batch,
        "replies": replies,
        "hours": hours,
        "chip_hours": hours * topology.chips,
    }


def _seconds(done: compiling.Compiled, topology: Topology, mesh: MeshConfig, rounds: int) -> float:
    """The time of a program; `rounds` of the loop that ends by data."""
    program = hlo.parse(done.text)
    times = hlo.count(program, {"while$": rounds}).times
    return timed(program, times, topology, mesh.axes)[0]["step"]


def sample_table(plans: list[dict[str, Any]]) -> str:
    """The plans as a Markdown table, a batch a row."""
    rows = [_HEAD, ["---"] * len(_HEAD), *(_row(plan) for plan in plans)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _row(plan: dict[str, Any]) -> list[str]:
    sizes = " ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
    cells = [plan["config"], plan["topology"], sizes or "one device", str(plan["rows"])]
    gib = plan["gib"]
    fits = "fits" if plan["fits"] else "**does not fit**"
    cells.append(f"{gib['needed']:.2f} of {gib['usable']:.2f}, {fits}")
    if not plan["fits"]:
        return [*cells, *["-"] * 6]
    seconds = plan["seconds"]
    cells += [f"{1e3 * seconds['prefill']:.0f} ms", f"{1e3 * seconds['token']:.2f} ms"]
    cells += [f"{seconds['token'] / seconds['bound']:.2f}", f"{plan['tokens_per_second']:,.0f}"]
    return [*cells, f"{plan['hours']:.1f}", f"{plan['chip_hours']:,.0f}"]
