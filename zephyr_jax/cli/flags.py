"""The flags that say how a command divides a model over the devices."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --tensor and --fsdp."""
    parser.add_argument("--tensor", type=int, default=1, help="devices that share a layer's heads")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that divide the weights")


def all_devices(tensor: int, fsdp: int) -> Any:
    """A context with the mesh of all devices; without one where there is but one device.

    Raises:
        ValueError: if the sizes do not divide the number of devices.
    """
    import jax

    from zephyr_jax.sharding import make_mesh

    n = jax.device_count()
    if min(tensor, fsdp) < 1 or n % (tensor * fsdp):
        raise ValueError(
            f"--tensor={tensor} times --fsdp={fsdp} must divide the {n} devices here; the rest "
            "of them goes to data"
        )
    return jax.set_mesh(make_mesh(-1, fsdp, tensor)) if n > 1 else contextlib.nullcontext()
