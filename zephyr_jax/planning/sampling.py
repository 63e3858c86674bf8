"""What replies cost on a slice: prefill and decoding of `generate`, compiled and read.

A token of every row reads all weights but the embedding, and the whole cache; the least time that
this can take is the bytes' bound.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.planning import compiling, hlo
from zephyr_jax.planning.compiling import Topology, bytes_of
from zephyr_jax.planning.estimate import timed
from zephyr_jax.planning.plans import first_cells, markdown

REPLIES = 64_000 * 4  # of a set as large as UltraFeedback
_HEAD = ("model", "slice", "mesh", "GiB a device", "replies at once", "prefill", "a token")
_HEAD += ("times the bound", "tokens/s", "hours", "chip-hours")


def sampling_mesh(config: RunConfig, topology: Topology) -> MeshConfig:
    """The config's mesh if it shards heads; else one that does as far as possible, then rows."""
    if config.mesh.tensor > 1:
        return config.mesh.sized(topology.devices, f"of {topology.name}")
    inside = topology.devices // topology.slices
    tensor = math.gcd(config.model.num_key_value_heads, inside)
    return MeshConfig(topology.devices // tensor, 1, tensor)


def sample_plan(
    config: RunConfig,
    topology: Topology,
    rows: int,
    lengths: tuple[int, int],
    replies: int | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The plan of answering with `rows` replies at once, REPLIES or `replies` in all.

    `lengths` are tokens of a prompt and of a reply. A ValueError if mesh or model cannot.
    """
    import jax

    from zephyr_jax.inference.decoding import CHUNK, rounded, traced
    from zephyr_jax.inference.sampling import SamplingParams
    from zephyr_jax.models.parameters import abstract_params
    from zephyr_jax.sharding import make_mesh

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
    done = [compiling.report(one, held, {}, topology, mesh, cache) for one in lowered]
    needed = max(one.wanted or one.peak / 2**30 for one in done)
    plan = {
        "config": config.name,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": mesh.axes,
        "rows": rows,
        "prompt_tokens": prompt,
        "new_tokens": lengths[1],
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
    batch, replies = prefill + token * lengths[1], replies or REPLIES
    hours = -(-replies // rows) * batch / 3600
    return plan | {
        "seconds": {"prefill": prefill, "token": token, "bound": bound},
        "bytes_a_token": read,
        "tokens_per_second": rows * lengths[1] / batch,
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
    return markdown(_HEAD, [[*first_cells(plan), *_cells(plan)] for plan in plans])


def _cells(plan: dict[str, Any]) -> list[str]:
    if not plan["fits"]:
        return [str(plan["rows"])]
    prefill, token, bound = plan["seconds"].values()
    cells = [str(plan["rows"]), f"{1e3 * prefill:.0f} ms", f"{1e3 * token:.2f} ms"]
    cells += [f"{token / bound:.2f}", f"{plan['tokens_per_second']:,.0f}"]
    return [*cells, f"{plan['hours']:.1f}", f"{plan['chip_hours']:,.0f}"]
