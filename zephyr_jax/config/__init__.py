"""Run configuration: frozen dataclasses, one section a stage, checked when they are made.

The checks that the dataclasses share are here; each raises a ValueError.
"""

from __future__ import annotations

import math
from typing import Any


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Refuses a value for which the rule does not hold."""
    if not holds:
        raise ValueError(f"{name}={value} must be {rule}")


def positive(owner: Any, *names: str) -> None:
    """Refuses fields of `owner` that are not above 0."""
    for name in names:
        require(getattr(owner, name) > 0, name, getattr(owner, name), "positive")


def choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value, or an entry of a tuple, that is not one of those allowed."""
    several = isinstance(value, tuple)
    for entry in value if several else (value,):
        if entry not in allowed:
            listed = f"one of {', '.join(allowed)}"
            if several:
                listed = f"some of {', '.join(allowed)}, written as a tuple: {allowed[:2]}"
            raise ValueError(f"{name}={entry!r} is not known; use {listed}")


def weighted(name: str, value: str | dict[str, float]) -> dict[str, float]:
    """Name -> weight of a field that holds one name, which has weight 1, or such a dict."""
    weights = {value: 1.0} if isinstance(value, str) else value
    if not weights or "" in weights:
        raise ValueError(f"{name}={value!r} is empty; write a name, or {{'NAME': WEIGHT, ...}}")
    for key, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"{name}: weight {weight} of {key} must be a number above 0")
    return weights
