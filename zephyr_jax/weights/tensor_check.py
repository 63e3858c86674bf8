"""Whether the tensors of a file are those that a configuration asks for, all faults in one line."""

from __future__ import annotations

import collections
import re

Shapes = dict[str, tuple[int, ...]]


def check_tensors(wanted: Shapes, found: Shapes, where: str) -> None:
    """Compares names and shapes.

    Args:
        wanted: what the configuration asks for.
        found: what there is.
        where: the file and what it has to fit, the beginning of the message.

    Raises:
        ValueError: naming every tensor that is missing, that has no place, or that has another
            shape.
    """
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    said = [f"missing: {listed(missing)}"] * bool(missing)
    said += [f"extra: {listed(extra)}"] * bool(extra)
    shapes = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    said += [f"shapes: {', '.join(shapes)}"] * bool(shapes)
    if said:
        raise ValueError(f"{where} do not fit; {'; '.join(said)}")


def listed(names: set[str]) -> str:
    """The names in order, those that differ in the layer alone as one: `layers.{0,1}.x`."""
    grouped = collections.defaultdict(list)
    for name in names:
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
        grouped[pattern].append("" if layer is None else int(layer.group()))
    return ", ".join(
        pattern.replace(
            "{}",
            str(layers[0]) if len(layers) == 1 else f"{{{','.join(map(str, sorted(layers)))}}}",
        )
        for pattern, layers in sorted(grouped.items())
    )
