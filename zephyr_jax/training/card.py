"""The fields of a model card that follow from the runs that made a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from etils import epath

from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checksums import workdir_and_steps


def model_card_fields(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """Lineage, base, recipe, data and metrics of a loaded model, as `weights.exports` takes them.

    Args:
        source: where the model was loaded from.
        lineage: `Model.lineage`.
    """
    card: dict[str, Any] = {"lineage": lineage["lineage"]}
    base = re.search(r"^ported from ([^/@ ]+/[^/@ ]+)@[0-9a-f]{40}$", lineage["lineage"][0])
    if base:
        card["base_model"] = base[1]
    config = lineage.get("config")
    if not config:
        return card
    data = config["data"]
    digests = {f"{data['dataset']} {data['splits'][0]}": lineage["dataset_digest"]}
    digests["packed set"] = lineage["packed"]
    if "reference_digest" in lineage:
        digests["reference"] = lineage["reference_digest"]
    card |= {"recipe": config, "data": digests}
    workdir, _ = workdir_and_steps(epath.Path(source))
    here = {"split": "eval", "step": lineage["step"]}
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if here.items() <= row.items()]
    if rows:
        card["metrics"] = {k: v for k, v in rows[-1].items() if k not in ("split", "step")}
    return card
