"""What a model card says of the runs that made a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from etils import epath


def model_card(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """What the exported model card says of where the model comes from."""
    from zephyr_jax.training.metrics import read_metrics

    card: dict[str, Any] = {"lineage": lineage["lineage"]}
    base = re.search(r"^ported from ([^/@ ]+/[^/@ ]+)@[0-9a-f]{40}$", lineage["lineage"][0])
    if base:
        card["base_model"] = base[1]
    config = lineage.get("config")
    if not config:
        return card
    data = config["data"]
    card |= {
        "recipe": config,
        "data": {
            f"{data['dataset']} {data['train_split']}": lineage["dataset_digest"],
            "packed set": lineage["packed"],
        },
    }
    if "reference_digest" in lineage:
        card["data"]["reference"] = lineage["reference_digest"]
    from zephyr_jax.weights.checksums import steps_of

    workdir, _ = steps_of(epath.Path(source))
    here = {"split": "eval", "step": lineage["step"]}
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if here.items() <= row.items()]
    if rows:
        card["metrics"] = {k: v for k, v in rows[-1].items() if k not in ("split", "step")}
    return card
