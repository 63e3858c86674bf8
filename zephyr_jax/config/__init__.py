"""Run configuration: the checks that its sections share, and the one way to it from files."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.resources
import math
import runpy
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What other trainers, or earlier versions, call a field
_ELSEWHERE = {"lr": "peak_lr", "learning_rate": "peak_lr", "lr_scheduler_type": "schedule"}
_ELSEWHERE |= {"r": "rank", "lora_r": "rank", "num_train_epochs": "epochs", "bs": "batch_size"}
_ELSEWHERE |= {"per_device_train_batch_size": "batch_size", "max_seq_length": "seq_len"}
_ELSEWHERE |= {"gradient_accumulation_steps": "micro_batches", "save_steps": "checkpoint_every"}
_ELSEWHERE |= {"logging_steps": "log_every", "gradient_checkpointing": "remat"}
_ELSEWHERE |= {"save_total_limit": "keep_checkpoints", "report_to": "trackers"}
_ELSEWHERE |= {"early_stopping": "keep_best", "early_stopping_patience": "keep_best"}


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Refuses a value for which the rule does not hold."""
    if not holds:
        raise ValueError(f"{name}={value!s:.200} must be {rule}")


def positive(owner: Any, *names: str) -> None:
    """Refuses fields of `owner` that are not above 0, or infinite."""
    for name in names:
        value = getattr(owner, name)
        require(0 < value < math.inf, name, value, "positive and finite")


def choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value, or an entry of a tuple, that is not one of those allowed."""
    listed = f"one of {', '.join(allowed)}"
    if isinstance(value, tuple):
        listed = f"some of {', '.join(allowed)}, written as a tuple: {allowed[:2]}"
    for entry in value if isinstance(value, tuple) else (value,):
        if entry not in allowed:
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


def read_file(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `get_config()` returns in a file, or in a recipe of the package ("zephyr_7b_sft").

    `overrides` are words such as `--config.optim.peak_lr=1e-5`, which may add a section. A
    FileNotFoundError, whose note lists the recipes, if there is neither file nor recipe.
    """
    path, shipped = Path(name), Path(str(importlib.resources.files("zephyr_jax.recipes")))
    if not path.is_file() and str(path.parent) in (".", "configs"):
        path = shipped / f"{path.stem}.py"
    if not path.is_file():
        raise importlib.import_module("zephyr_jax.recipes.__main__").missing(name)
    try:
        tree = runpy.run_path(str(path))["get_config"]().to_dict()
    except (Exception, SystemExit) as error:  # running the file may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a config file with get_config() ({problem})") from error
    for word in overrides:
        field, equals, text = word.removeprefix("--config.").partition("=")
        if not (word.startswith("--config.") and equals):
            raise ValueError(f"{word!r} is not --config.FIELD=VALUE; write overrides in that form")
        *sections, last = field.split(".")
        section = tree
        for key in sections:
            section[key] = section[key] if isinstance(section.get(key), dict) else {}
            section = section[key]
        section[last] = _Word(text)
    return tree


def build(cls: Any, tree: dict[str, Any], path: str = "config", root: Any = None) -> Any:
    """The dataclass `cls` that a nested dict describes; `root` is the class of the whole."""
    hints, root = typing.get_type_hints(cls), root or cls
    # Both are the same, MISSING, where a field has no default; an architecture is spelled out.
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory or getattr(cls, "spelled_out", False)
    }
    problems = [
        f"{path}.{name}: no such field; {_nearest(root, path, name, hints)}"
        for name in sorted(set(tree) - set(hints))
    ]
    if absent := [name for name in hints if name in required - set(tree)]:
        problems.append(
            f"{path} ({cls.__name__}) lacks {', '.join(absent)}; add {path}.{absent[0]} = ... to "
            f"the file, --{path}.{absent[0]}=... to the command, or begin with a recipe"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**{k: typed(hints[k], v, f"{path}.{k}", root) for k, v in tree.items()})


def _paths(cls: Any, path: str = "config") -> list[str]:
    """`config.seed`, `config.optim`, `config.optim.name`: every section, field and option."""
    paths = []
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        paths.append(f"{path}.{field.name}")
        paths += [f"{paths[-1]}.{option}" for option in field.metadata.get("options", ())]
        for section in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            paths += _paths(section, f"{path}.{field.name}")
    return paths


def _nearest(root: Any, path: str, name: str, fields: Iterable[str]) -> str:
    """Which field may be meant by an unknown one: of that name elsewhere, or of a like name."""
    name, paths = _ELSEWHERE.get(name, name), _paths(root)
    here = [found for found in paths if found.rpartition(".")[0] == path]
    for group, cutoff in ((here, 1.0), (paths, 1.0), (here, 0.6), (paths, 0.7)):
        last = {found.rpartition(".")[2]: found for found in reversed(group)}
        for match in difflib.get_close_matches(name, last, 1, cutoff):
            return f"did you mean {match if group is here else last[match]}?"
    return f"it has {', '.join(fields)}"


class _Word(str):
    """What stands behind the = of an override; the field's type says how it is read."""


def typed(hint: Any, value: Any, path: str, root: Any = None) -> Any:
    """The value as the type that a hint names; a ValueError, which begins with `path`, if not."""
    if isinstance(value, _Word):
        value = str(value) if hint is str else _literal(value)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    for choice in choices:
        if isinstance(value, dict) and named and dataclasses.is_dataclass(choice):
            return build(choice, value, path, root)
        if choice is float and type(value) is int and abs(value) < 1e308:
            return float(value)
        origin, item = typing.get_origin(choice), (*typing.get_args(choice), None)
        if origin is tuple:  # JSON has lists only; one value stands for a tuple of one
            entries = value if isinstance(value, tuple | list) else (value,)
            return tuple(typed(item[0], entry, path, root) for entry in entries)
        if isinstance(value, dict) and named and origin is dict:
            return {k: typed(item[1], entry, f"{path}.{k}", root) for k, entry in value.items()}
        if type(value) is choice:
            return value
    names = " or ".join(str(c) if typing.get_args(c) else c.__name__ for c in choices)
    raise ValueError(f"{path}={value!r} must be of type {names}")


def _literal(text: str) -> Any:
    """What a word on the command line spells: a Python literal, true, false, inf, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return read(text)
    return str(text)
