"""What the processes of a run tell each other before they can compute together.

Their words go through JAX's coordination service, on process 0, and not through the devices: a
process that has failed, or has other programs, would let a collective operation wait for ever.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the public interface has no texts to exchange

MEETING = 900.0  # seconds that the processes may be apart: some copy data, others have it already
_LOOK = 0.2  # seconds between two looks
_FAILED = "zephyr_jax/failed/"
_rounds = itertools.count()  # every process goes through the same rounds
_T = TypeVar("_T")


class Disagreement(ValueError):
    """The processes are not those of one run; every one of them raises this, with one line."""


def agree(facts: Mapping[str, Any], seconds: float = MEETING) -> None:
    """Returns where every process has the same facts; one process alone has.

    Args:
        facts: name -> what JSON can hold; the same names everywhere.
        seconds: how long to wait for the others.

    Raises:
        Disagreement: on every process, naming each difference, the processes that failed before
            they came here (`leave_word`), or those that did not come.
    """
    if jax.process_count() == 1:
        return
    here, client = f"zephyr_jax/{next(_rounds)}/", _client()
    client.key_value_set(f"{here}said/{jax.process_index()}", json.dumps(dict(facts)))
    if not jax.process_index():
        client.key_value_set(f"{here}verdict", json.dumps(_verdict(here, seconds)))
    # process 0 gives up first, so that its line is everybody's
    if said := _from_first(f"{here}verdict", seconds + 30):
        raise Disagreement(said)


def first_decides(decide: Callable[[], _T], seconds: float = 3600) -> _T:
    """What `decide` (something that JSON can hold) gives on process 0, where alone it is called.

    Raises:
        Disagreement: on the others, if process 0 fails or takes longer.
    """
    if jax.process_count() == 1:
        return decide()
    key = f"zephyr_jax/{next(_rounds)}/decision"
    if not jax.process_index():
        decided = decide()
        _client().key_value_set(key, json.dumps(decided))
        return decided
    return _from_first(key, seconds)


def leave_word(error: BaseException) -> None:
    """Tells processes that wait for this one, now or later, that they wait in vain."""
    if jax.process_count() > 1 and not isinstance(error, Disagreement):
        said = f"{type(error).__name__}: {error}"
        key = f"{_FAILED}{jax.process_index()}"
        _client().key_value_set(key, json.dumps(" ".join(said.split())), allow_overwrite=True)


def _verdict(here: str, seconds: float) -> str:
    """On process 0: what is wrong with what all have said, in a line; empty where nothing is."""
    n, end = jax.process_count(), time.monotonic() + seconds
    while True:
        said = _texts(f"{here}said/")
        if len(said) == n:
            return _difference([said[i] for i in range(n)])
        if failed := _texts(_FAILED):
            return "; ".join(f"process {i} failed: {text}" for i, text in sorted(failed.items()))
        if time.monotonic() > end:
            missing = [i for i in range(n) if i not in said]
            return (
                f"{_named(missing)} did not come to the start of the run within {seconds:.0f} s of "
                "process 0; look at what they print, and start all processes again"
            )
        time.sleep(_LOOK)


def _difference(said: list[dict[str, Any]]) -> str:
    """Each fact that is not the same everywhere, with the processes of each value."""
    lines = []
    for name in dict.fromkeys(name for facts in said for name in facts):
        values: dict[str, list[int]] = {}
        for process, facts in enumerate(said):
            values.setdefault(json.dumps(facts.get(name)), []).append(process)
        if len(values) > 1:
            told = (f"{value} on {_named(who)}" for value, who in values.items())
            lines.append(f"{name} is {', '.join(told)}")
    if not lines:
        return ""
    return (
        f"the processes are not those of one run: {'; '.join(lines)}; give every host the same "
        "package, command and data, and start all processes again"
    )


def _named(processes: list[int]) -> str:
    text = [str(i) for i in processes]
    if len(text) == 1:
        return f"process {text[0]}"
    if len(text) > 8:
        return f"{len(text)} processes, the first of them {text[0]}"
    return f"processes {', '.join(text[:-1])} and {text[-1]}"


def _from_first(key: str, seconds: float) -> Any:
    """What process 0 writes under `key`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name, _, last = key.rpartition("/")
        found = dict(_entries(f"{name}/"))
        if last in found:
            return json.loads(found[last])
        if failed := _texts(_FAILED).get(0):
            raise Disagreement(f"process 0 failed: {failed}")
        time.sleep(_LOOK)
    raise Disagreement(f"process 0 said nothing within {seconds:.0f} s; look at what it prints")


def _texts(folder: str) -> dict[int, Any]:
    """Process -> what it left in a folder."""
    return {int(name): json.loads(text) for name, text in _entries(folder)}


def _entries(folder: str) -> list[tuple[str, str]]:
    found = _client().key_value_dir_get(folder)
    return [(key.removeprefix(folder), text) for key, text in found]


def _client() -> Any:
    return distributed.global_state.client
