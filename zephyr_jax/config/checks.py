"""Checks that the configuration dataclasses share."""

from __future__ import annotations

from typing import Any


def choose(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises a ValueError unless the value is one of those allowed."""
    if value not in allowed:
        said = ", ".join(map(str, allowed))
        raise ValueError(f"{name}={value!r} is not known; use one of {said}")


def positive(owner: Any, *names: str) -> None:
    """Raises a ValueError unless these fields of `owner` are above 0."""
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{name}={getattr(owner, name)} must be positive")


def names_in(said: str) -> tuple[str, ...]:
    """The names of a list such as "q, k, v"."""
    return tuple(name.strip() for name in said.split(",") if name.strip())


def weighted_names(field: str, said: str) -> dict[str, float]:
    """Name -> weight of a list such as "sigmoid, sft=0.2"; a name without a weight counts once.

    Example: `"ultrachat/200k, messages/own=0.5"` is `{"ultrachat/200k": 1.0, "messages/own": 0.5}`.

    Raises:
        ValueError: if a name is missing or there twice, or a weight is no positive number.
    """
    found: dict[str, float] = {}
    for part in said.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not name:
            raise ValueError(f"{field}={said!r} has a part without a name; write NAME=WEIGHT")
        if name in found:
            raise ValueError(f"{field}={said!r} names {name} twice; give it one weight")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"{field}: weight {number!r} of {name} must be a number above 0")
        found[name] = weight
    return found
