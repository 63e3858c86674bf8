"""Checks that the configuration dataclasses share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def choose(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises a ValueError unless the value is one of those allowed."""
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{name}={value!r} is not known; use one of {names}")


def choose_all(name: str, values: Iterable[str], allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless each value is one of those allowed."""
    for value in values:
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} is not known; use some of {', '.join(allowed)}, written as a "
                f"tuple: {allowed[:2]}"
            )


def positive(owner: Any, *names: str) -> None:
    """Raises a ValueError unless these fields of `owner` are above 0."""
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{name}={getattr(owner, name)} must be positive")


def weighted(name: str, value: str | dict[str, float]) -> dict[str, float]:
    """Name -> weight of a field that holds one name, which has weight 1, or such a dict.

    Raises:
        ValueError: if there is no name, or a weight is not a positive number.
    """
    weights = {value: 1.0} if isinstance(value, str) else value
    if not weights or "" in weights:
        raise ValueError(f"{name}={value!r} is empty; write a name, or {{'NAME': WEIGHT, ...}}")
    for key, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"{name}: weight {weight} of {key} must be a number above 0")
    return weights
