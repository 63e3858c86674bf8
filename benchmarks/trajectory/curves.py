"""The curves that are compared, how far two of them are apart, and their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

STEPS = 50
BOUND = 1e-4  # of a curve's own largest value
FALL = 0.3  # the share of its first value that a loss must lose for the comparison to mean anything
_COMMON = ("loss", "grad_norm", "learning_rate")
NAMES = {
    "sft": _COMMON,
    "dpo": (
        *_COMMON,
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected"),
    ),
}
Curves = dict[str, dict[str, list[float]]]  # stage -> name -> a value for each step


class Gap(NamedTuple):
    """How far two curves are apart at most."""

    stage: str
    name: str
    largest: float  # absolute value of the first curve
    apart: float  # absolute difference

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; NaN counts as far apart."""
        share = self.apart / self.largest if self.largest else float(self.apart > 0)
        return share if np.isfinite(share) else float("inf")


def gaps(one: Curves, other: Curves) -> list[Gap]:
    """The largest difference of every curve of `one`."""
    found = []
    for stage, curves in one.items():
        for name, values in curves.items():
            a, b = np.asarray(values), np.asarray(other[stage][name])
            assert a.shape == b.shape, (stage, name, a.shape, b.shape)
            found.append(Gap(stage, name, np.abs(a).max(), np.abs(a - b).max()))
    return found


def falls(curves: Curves) -> dict[str, float]:
    """By stage, by what share of its first value the loss has fallen: mean of the last 5 steps."""
    losses = {stage: np.asarray(named["loss"]) for stage, named in curves.items()}
    return {stage: float(1 - loss[-5:].mean() / loss[0]) for stage, loss in losses.items()}


def read(path: Path) -> dict[str, Curves]:
    """The curves in a file, by whose they are."""
    return json.loads(path.read_text())


def write(path: Path, curves_of: dict[str, Curves]) -> None:
    """Writes such a file, eight digits of each value, a curve a line."""
    lines = []
    for who, curves in curves_of.items():
        stages = []
        for stage, named in curves.items():
            rows = [
                f'   "{name}": [{", ".join(f"{value:.8g}" for value in values)}]'
                for name, values in named.items()
            ]
            stages.append(f'  "{stage}": {{\n' + ",\n".join(rows) + "\n  }")
        lines.append(f' "{who}": {{\n' + ",\n".join(stages) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def table(found: list[Gap]) -> str:
    """The differences as a Markdown table."""
    rows = ["| stage | curve | largest value | largest difference | share |", "|-|-|-:|-:|-:|"]
    rows += [f"| {g.stage} | {g.name} | {g.largest:.4g} | {g.apart:.2g} | {g.share:.1e} |"
             for g in found]  # fmt: skip
    return "\n".join(rows) + "\n"
